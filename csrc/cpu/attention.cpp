// Attention on the CPU: what Python calls. attention.h says what both directions share, tile.h what they are
// made of.

#include "attention_bwd.h"
#include "attention_fwd.h"
#include "export.h"

FG_EXPORTS(attention, FG_EXPORT(attention_fwd), FG_EXPORT(attention_bwd))
