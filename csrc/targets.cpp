// Compiles the kernels for several instruction sets and chooses one at run time, so that one binary suits every processor and does
// not depend on the machine that compiled it.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "problem.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MOPE_X86_TARGETS
#include <immintrin.h>
#endif

#if defined(__clang__)
#define MOPE_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define MOPE_UNROLL _Pragma("GCC unroll 16")
#else
#define MOPE_UNROLL
#endif

#if defined(__GNUC__)
#define MOPE_SIMD _Pragma("omp simd")
#define MOPE_RESTRICT __restrict__
#define MOPE_PREFETCH(address, write) __builtin_prefetch(address, write, 2)
#else
#define MOPE_SIMD
#define MOPE_RESTRICT __restrict
#define MOPE_PREFETCH(address, write)
#endif

#define MOPE_TARGET portable
#define MOPE_LANES 4
#if defined(__aarch64__) || defined(_M_ARM64)
#define MOPE_VECS 4
#else
#define MOPE_VECS 2
#endif
#include "kernels.h"

#if defined(MOPE_X86_TARGETS)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define MOPE_TARGET avx2
#define MOPE_LANES 8
#define MOPE_VECS 2
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define MOPE_TARGET avx512
#define MOPE_LANES 16
#define MOPE_VECS 4
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// Products of bfloat16s, which compilers from before 2020 do not support.
#if (defined(__clang__) && __clang_major__ >= 10) || (!defined(__clang__) && __GNUC__ >= 10)
#define MOPE_AVX512_BF16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define MOPE_TARGET avx512_bf16
#define MOPE_LANES 16
#define MOPE_VECS 4
#define MOPE_PAIRS 1
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#endif

namespace mope {

static const Kernels& choose() {
  // MOPE_CPU_TARGET selects a lesser instruction set than the best one available, for tests.
  const char* variable = std::getenv("MOPE_CPU_TARGET");
  const std::string_view wish = variable ? variable : "";
#if defined(MOPE_X86_TARGETS)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool portable = wish == "portable", avx2 = portable || wish == "avx2";
#if defined(MOPE_AVX512_BF16)
  if (has_avx512 && __builtin_cpu_supports("avx512bf16") && !avx2 && wish != "avx512") return avx512_bf16::kKernels;
#endif
  if (has_avx512 && !avx2) return avx512::kKernels;
  if (has_avx2 && !portable) return avx2::kKernels;
#endif
  return portable::kKernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace mope
