// Functions of sixteen floats, for the instruction set that MF_ISA names; included behind its lanes. Everything is inside
// a namespace of its own, so that code for different instruction sets never shares a symbol.
#pragma once

namespace megaforge::moe::MF_ISA {

// exp(x) for x <= 0, to 1.5 units in the last place; below -104 (AVX-512) or -87 (others) zero. A NaN stays one.
MEGAFORGE_INLINE F exp_of_negative(F x) {
  x = max(set(-104.0f), x);
  const F n = round(mul(x, set(1.44269504088896341f)));
  F r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  F y = fma(set(1.9875691500e-4f), r, set(1.3981999507e-3f));  // Cephes, expf
  y = fma(y, r, set(8.3334519073e-3f));
  y = fma(y, r, set(4.1665795894e-2f));
  y = fma(y, r, set(1.6666665459e-1f));
  y = fma(y, r, set(5.0000001201e-1f));
  y = add(fma(y, mul(r, r), r), set(1.0f));
  return times_power_of_two(y, n);
}

// log(x) for normal x > 0, to 1.5 units in the last place.
MEGAFORGE_INLINE F log_of_positive(F x) {
  F n = exponent(x), m = mantissa(x);  // x = 2^n * m, m in [1, 2)
  const M high = less(set(1.41421356f), m);
  n = pick(high, add(n, set(1.0f)), n);
  m = sub(pick(high, mul(m, set(0.5f)), m), set(1.0f));
  const F square = mul(m, m);
  F y = fma(set(7.0376836292e-2f), m, set(-1.1514610310e-1f));  // Cephes, logf
  y = fma(y, m, set(1.1676998740e-1f));
  y = fma(y, m, set(-1.2420140846e-1f));
  y = fma(y, m, set(1.4249322787e-1f));
  y = fma(y, m, set(-1.6668057665e-1f));
  y = fma(y, m, set(2.0000714765e-1f));
  y = fma(y, m, set(-2.4999993993e-1f));
  y = fma(y, m, set(3.3333331174e-1f));
  y = mul(mul(y, m), square);
  y = fma(n, set(-2.12194440e-4f), y);
  y = fma(square, set(-0.5f), y);
  return fma(n, set(0.693359375f), add(m, y));
}

// 1 / (1 + exp(-x)).
MEGAFORGE_INLINE F sigmoid(F x) {
  const F small = exp_of_negative(negative_abs(x));
  return div(pick(less(x, set(0.0f)), small, set(1.0f)), add(small, set(1.0f)));
}

}  // namespace megaforge::moe::MF_ISA
