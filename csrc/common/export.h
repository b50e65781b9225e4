// How a kernel becomes callable: every op source ends in
//
//   FG_EXPORTS(layer_norm, FG_EXPORT(layer_norm_fwd), FG_EXPORT(layer_norm_bwd))
//
// at file scope. Argument list and trampoline come from the function's own type, so there is no second list
// of parameters to keep in step. Kernels return void and live in namespace fg::FG_LEVEL.
#pragma once

#include <cstdint>

namespace fg {

union Arg {
  void* p;
  int64_t i;
  double f;
};

// signature: one character per parameter: 'p' pointer, 'i' integer, bool or enum, 'f' float or double.
struct Export {
  const char* name;
  const char* signature;
  void (*call)(const Arg*);
};

struct ExportTable {
  const Export* entries;
  int count;
};

constexpr int kMaxArgs = 96;

}  // namespace fg

#ifdef FG_LEVEL

namespace fg::FG_LEVEL {
namespace {  // internal linkage: a weak template symbol compiled for AVX-512 could be linked into every level

template <class T>
constexpr char kind = 'i';
template <class T>
constexpr char kind<T*> = 'p';
template <>
constexpr char kind<float> = 'f';
template <>
constexpr char kind<double> = 'f';

template <class T>
T next(const Arg*& args) {
  const Arg arg = *args++;
  if constexpr (kind<T> == 'p') {
    return static_cast<T>(arg.p);
  } else if constexpr (kind<T> == 'f') {
    return static_cast<T>(arg.f);
  } else {
    return static_cast<T>(arg.i);
  }
}

template <auto Function>
struct Kernel;

template <class... A, void (*Function)(A...)>
struct Kernel<Function> {
  static_assert(sizeof...(A) <= kMaxArgs, "raise kMaxArgs");
  static constexpr char signature[] = {kind<A>..., '\0'};

  struct Call {
    explicit Call(A... args) { Function(args...); }
  };

  // Braces, not parentheses: only a braced list is evaluated from left to right.
  static void call([[maybe_unused]] const Arg* args) { Call{next<A>(args)...}; }
};

}  // namespace
}  // namespace fg::FG_LEVEL

#define FG_EXPORT(function)                                             \
  {#function, fg::FG_LEVEL::Kernel<&fg::FG_LEVEL::function>::signature, \
   &fg::FG_LEVEL::Kernel<&fg::FG_LEVEL::function>::call}

#define FG_EXPORTS(op, ...)                                                                   \
  namespace fg::FG_LEVEL {                                                                    \
  static constexpr Export op##_entries[] = {__VA_ARGS__};                                     \
  extern const ExportTable op##_exports;                                                      \
  constexpr ExportTable op##_exports = {op##_entries, sizeof(op##_entries) / sizeof(Export)}; \
  }

#endif  // FG_LEVEL
