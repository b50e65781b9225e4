"""What was found behind the failures in the table of `python -m benchmarks foreign`, by reading the sources.

By function of `foreign.py` and hazard. Liger's are those of one version, and told of no other.
"""

from __future__ import annotations

LIGER_VERSION = "0.8.5"

NO_COLUMNS = "rows of no columns: `view(-1, 0)` is ambiguous. Harmless."
IN_PLACE = (
    "as its authors mean it, to save memory: backward writes the gradients over the saved inputs, which"
    " are the caller's where those are contiguous. Whoever uses them afterwards (another branch, a hook, a"
    " second backward) gets gradients for activations, and autograd's version counter does not see it."
)
ROUNDED_HALF = (
    "the activation is rounded to x's dtype before the product, which rounds again; eager PyTorch does"
    " the same."
)
COMPOSITE = "several ops of PyTorch in a row, and each rounds to 16 bits; gradients are sums of such."
READ: dict[tuple[str, str], str] = {
    ("liger_layer_norm", "expanded gradient"): (
        "rows are added one after the other in fp32; equal gradients round the same way each time. On CPU"
        " tensors it counts one multiprocessor, so that all 70 rows are one sum; with 132 of them it"
        " takes 9240 rows."
    ),
    ("liger_layer_norm", "raised"): NO_COLUMNS,
    ("liger_rms_norm", "input mutated"): (
        "its default in_place=True writes dx over dy, as its docstring says, with the warning that a residual"
        " around the norm then gets wrong gradients. `liger_rms_norm_gemma` has in_place=False, and passes."
    ),
    ("liger_rms_norm", "not repeatable"): "the second backward starts from the overwritten dy.",
    ("liger_rms_norm", "bound"): (
        'casting_mode "llama" rounds x̂ to 16 bits before the weight, as Hugging Face\'s Llama does: a'
        " difference of definition. Not of definition: for dw the product dy * x̂ is rounded once more before"
        " it is summed."
    ),
    ("liger_rms_norm", "raised"): NO_COLUMNS,
    ("liger_rms_norm_gemma", "raised"): NO_COLUMNS,
    ("liger_softmax", "bound"): (
        "backward multiplies dy * y in 16 bits, and sums the products in 16 bits (`tl.sum` does not widen),"
        " before the difference with dy cancels. Statistics belong in fp32. A GPU's sum is worse than this"
        " one."
    ),
    (
        "liger_softmax",
        "expanded gradient",
    ): "the same: for equal gradients dx is 0, and what is left is their rounding.",
    ("liger_softmax", "raised"): NO_COLUMNS,
    ("liger_geglu", "alias"): IN_PLACE,
    ("liger_geglu", "input mutated"): IN_PLACE,
    ("liger_geglu", "not repeatable"): "the second backward reads gradients where activations were.",
    ("liger_geglu", "bound"): (
        "16 bits: the activation is rounded to x's dtype before the product, which rounds again; eager"
        " PyTorch does the same. fp32: 1 + tanh and 1 - tanh² cancel where the gate is far from 0, a quarter"
        " past the bound; PyTorch's own stays inside."
    ),
    ("liger_swiglu", "alias"): IN_PLACE,
    ("liger_swiglu", "input mutated"): IN_PLACE,
    ("liger_swiglu", "not repeatable"): "the second backward reads gradients where activations were.",
    ("liger_swiglu", "bound"): ROUNDED_HALF,
    ("liger_swiglu", "raised"): NO_COLUMNS,
    ("liger_cross_entropy", "input mutated"): (
        "as meant, to save memory: forward writes the gradient over the logits, which autograd's version"
        " counter does not see (its issue 272: a softmax before it gets wrong gradients)."
    ),
    ("liger_cross_entropy", "alias"): "the gradient is the logits' memory.",
    ("liger_cross_entropy", "not repeatable"): (
        "backward multiplies the stored gradient by dloss in place: a second one multiplies it again. With"
        " dloss = 1, which is skipped, it does not show."
    ),
    ("liger_cross_entropy", "layout"): (
        "a defect. Logits whose last dimension is not contiguous (a transposed view) are copied inside"
        " forward, where autograd is off; the kernel then asks the copy whether it requires a gradient, hears"
        " no and computes none, and backward returns the logits themselves for a gradient. The loss is right."
        " Found by this harness; it is Python, so a GPU does the same."
    ),
    ("liger_cross_entropy", "dtype"): (
        "the loss is in the logits' dtype, as F.cross_entropy's is; this op's is fp32. Each row's loss,"
        " divided by their number already, is rounded to 16 bits before the rows are summed. Its values were"
        " not judged."
    ),
    ("liger_cross_entropy", "bound"): (
        "the mean over no targets: 0 here, NaN in PyTorch and by this op's definition. A difference of"
        " definition."
    ),
    (
        "liger_cross_entropy",
        "raised",
    ): "no rows: the check of the targets' range takes a maximum over nothing.",
    (
        "pytorch_attention",
        "no-grad differs",
    ): "SDPA takes another kernel where a mask requires a gradient; under no_grad nothing does.",
    ("pytorch_attention", "bound"): (
        "SDPA wants masks in q's dtype, so that an fp32 mask and ALiBi are rounded to 16 bits; what it has no option"
        " for (softcap, lse) is written out, and the scores are rounded to 16 bits before the softmax."
    ),
    ("pytorch_attention", "expanded gradient"): (
        "SDPA adds dv up in 16 bits, block by block of 32 or 64 queries (the same sum by hand is equal to the bit)."
    ),
    ("pytorch_attention_qkv", "bound"): "as attention.",
    ("pytorch_attention_qkv", "expanded gradient"): "as attention.",
    ("pytorch_attention_varlen", "bound"): "as attention.",
    ("pytorch_attention_varlen", "expanded gradient"): "as attention.",
    ("pytorch_attention_qkv", "no-grad differs"): "as attention.",
    ("pytorch_attention", "leak"): "hidden keys weigh 0, and 0 times NaN is NaN.",
    ("pytorch_attention_qkv", "leak"): "as attention.",
    (
        "pytorch_cross_entropy",
        "leak",
    ): "a NaN in the logits of an ignored row makes its gradient NaN, where it is 0.",
    ("pytorch_cross_entropy", "raised"): NO_COLUMNS,
    ("pytorch_cross_entropy", "expanded gradient"): (
        "log_softmax's backward adds the gradients of all 50,257 classes, of which the smoothing makes all but one"
        " equal, in fp32; the rounding of that sum goes into every element."
    ),
    (
        "pytorch_embedding",
        "bound",
    ): "the gradient of a row is rounded to 16 bits after every token that is added to it.",
    ("pytorch_embedding", "expanded gradient"): (
        "rows of a token are added one after the other in fp32; equal gradients round the same way each time."
    ),
    ("pytorch_geglu", "bound"): ROUNDED_HALF,
    ("pytorch_swiglu", "bound"): ROUNDED_HALF,
    ("pytorch_gelu", "bound"): COMPOSITE,
    (
        "pytorch_gelu",
        "stale",
    ): "nothing is cached: the first values happened to pass, these do not, as in `bound`.",
    ("pytorch_rope", "bound"): COMPOSITE,
    ("pytorch_linear", "bound"): COMPOSITE,
    (
        "pytorch_linear",
        "stale",
    ): "nothing is cached: the first values happened to pass, these do not, as in `bound`.",
    ("pytorch_linear", "layout"): (
        "the product of an x that is not contiguous is rounded to 16 bits before the bias is added (equal to the bit"
        " to x @ weight.T + bias)."
    ),
    ("pytorch_mlp", "bound"): COMPOSITE,
    ("pytorch_mlp", "expanded gradient"): COMPOSITE,
    ("pytorch_rms_norm", "bound"): COMPOSITE,
    ("pytorch_layer_norm", "bound"): (
        "dweight and dbias are rounded to x's dtype after every row that is added, with fp32 weight and bias"
        " too (the same sum by hand is equal to the bit)."
    ),
    ("pytorch_layer_norm", "expanded gradient"): "the same sum row by row.",
    ("pytorch_layer_norm", "raised"): "bf16 weights beside an fp32 stream: PyTorch has no such call.",
    (
        "pytorch_softmax",
        "not written",
    ): "rows that see nothing are NaN in PyTorch and 0 by this op's definition.",
    ("pytorch_softmax", "dtype"): "an fp32 mask makes the scores fp32: a difference of definition.",
    ("pytorch_softmax", "bound"): COMPOSITE,
}
