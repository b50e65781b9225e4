// What the build generates for the binding (cpu_tables.cpp, cuda_tables.cpp, written by setup.py).
#pragma once

#include "../common/export.h"

namespace fg {

struct LevelTable {
  const char* level;
  const ExportTable* table;
};

extern const char source_hash[];    // of the csrc files this binary was compiled from
extern const char* const levels[];  // ascending, ends in nullptr
extern const LevelTable tables[];   // every (level, op), ends in {nullptr, nullptr}

}  // namespace fg
