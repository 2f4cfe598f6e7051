// What a thread sets up before it multiplies, and puts back after.
#ifndef ZEN_TURBO_DOT_H
#define ZEN_TURBO_DOT_H

namespace {

// Probabilities run out to numbers below 2^-126. Intel's CPUs hand such denormals to microcode, which made attention four times slower there; to an
// answer they are zeros.
struct FlushDenormals {
#if defined(__SSE__)
  const unsigned before = __builtin_ia32_stmxcsr();
  FlushDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }  // results, and operands
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

// The base of a Dot that multiplies in vector registers.
struct InRegisters {
  static constexpr bool TILES = false;
  typedef FlushDenormals Thread;
};

// The Dot that multiplies 8-bit codes of pages as they are, for targets that have one beside this Dot; its A is 16-bit integers, and its sums are
// 32-bit integers in the bits of a vec.
template <class Dot>
struct CodesOf {
  typedef void Type;
};

}  // namespace
#endif
