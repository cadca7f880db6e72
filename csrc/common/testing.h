// What the C++ tests of csrc/*/tests share: random numbers, comparison, the outcome. run_scripts/sanitize.sh runs them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace megaforge::testing {

// Vectors of normal numbers, and whole numbers, from one seed.
class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}

  std::vector<double> normal(std::size_t count, double scale = 1) {
    std::normal_distribution<double> distribution(0, scale);
    std::vector<double> out(count);
    for (double& x : out) x = distribution(engine_);
    return out;
  }

  // From low to high, both included.
  long whole(long low, long high) { return std::uniform_int_distribution<long>(low, high)(engine_); }

 private:
  std::mt19937 engine_;
};

inline int failures = 0;

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// |got - expected| <= tolerance * |expected| in the Euclidean norm; a vector of zeros must be zero to 1e-6.
template <typename T>
void expect_close(const std::vector<T>& got, const std::vector<double>& expected, double tolerance, const std::string& what) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double relative = std::sqrt(error) / std::fmax(std::sqrt(norm), 1e-6);
  expect(got.size() == expected.size() && relative <= tolerance, what + ": relative error " + std::to_string(relative));
}

inline int finish(const char* name) {
  std::printf("%s: %s\n", name, failures == 0 ? "passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}

}  // namespace megaforge::testing
