// What one thread does of a block, of experts and of the head, for the instruction set that MF_ISA names; included once by
// each of its files, after the headers of which it is made.

namespace megaforge::decode::MF_ISA {

template <class T>
void block(const Block<T>& problem, Team team) {
  Take shared(team.shared), own(team.own);
  if (problem.time_mix != nullptr) {
    time_mix(problem, *problem.time_mix, TimeMixMemory<T>(problem, *problem.time_mix, shared, own), team);
  }
  if (problem.attention != nullptr) {
    attention(problem, *problem.attention, AttentionMemory<T>(problem, *problem.attention, shared, own), team);
  }
  if (problem.ffn == nullptr && problem.router == nullptr) return;
  wait_for_all();
  if (problem.ffn != nullptr) {
    const FFN<T>& layer = *problem.ffn;
    ffn(problem, layer, FFNMemory<T>(problem.tokens, problem.hidden, layer.up, layer.down, shared, own), team);
  } else {
    router(problem, *problem.router, RouterMemory<T>(problem, own), team);
  }
}

template <class T>
void head(const Head<T>& problem, Team team) {
  T* normed = Take(team.own).many<T>(problem.tokens * problem.hidden);
  for (int64_t m = 0; m < problem.tokens; ++m) {
    normalize(problem.norm, problem.x + m * problem.hidden, problem.hidden, normed + m * problem.hidden);
  }
  multiply(problem.matrix, normed, problem.tokens, problem.logits, share(problem.matrix.n, kGranule, team));
}

template <class T>
constexpr KernelsOf<T> kernels_of = {block<T>, experts<T>, head<T>};

constexpr Kernels all_kernels = {kernels_of<float>, kernels_of<Bf16>};

}  // namespace megaforge::decode::MF_ISA
