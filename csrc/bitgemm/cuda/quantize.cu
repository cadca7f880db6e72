#include "prepare.cuh"
#include "quantize.cuh"
#include "start.cuh"

namespace megaforge::bitgemm {
namespace {

__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const Preparation preparation) {
  prepare_block(Block<kPrepareThreads>{}, preparation, static_cast<std::int64_t>(blockIdx.x));
}

__global__ void __launch_bounds__(kPrepareThreads) plain_kernel(const Product product) {
  plain_block(Block<kPrepareThreads>{}, product, static_cast<std::int64_t>(blockIdx.x));
}

template <int kBits>
__global__ void __launch_bounds__(kPrepareThreads) finish_kernel(const Product product) {
  finish_block<kBits>(Block<kPrepareThreads>{}, product, static_cast<std::int64_t>(blockIdx.x));
}

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(const Quantization quantization) {
  __shared__ QuantizeShared shared;
  quantize_block<T>(Block<kQuantizeThreads>{}, shared, quantization, static_cast<int>(blockIdx.x));
}

__global__ void __launch_bounds__(kQuantizeThreads) arrange_kernel(const Quantization quantization) {
  __shared__ QuantizeShared shared;
  arrange_block(Block<kQuantizeThreads>{}, shared, quantization, static_cast<int>(blockIdx.x));
}

unsigned blocks_of(std::int64_t threads) { return static_cast<unsigned>((threads + kPrepareThreads - 1) / kPrepareThreads); }

const char* said(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

cudaError_t start_plain(const Product& p, void* stream) {
  const unsigned blocks = blocks_of(static_cast<std::int64_t>(p.tokens) * p.rows);
  plain_kernel<<<blocks, kPrepareThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

cudaError_t start_finish(const Product& p, void* stream) {
  const unsigned blocks = blocks_of(static_cast<std::int64_t>(p.tokens) * p.rows);
  return with_bits(p.bits, [&]<int kBits>() {
    finish_kernel<kBits><<<blocks, kPrepareThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    return cudaGetLastError();
  });
}

int count_processors() {
  int device = 0, count = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known ? count : 1;
}

const char* prepare(const Preparation& p, void* stream) {
  const unsigned blocks = blocks_of(panel_words(p.bits, p.depth) * panels_of(p.rows));
  prepare_kernel<<<blocks, kPrepareThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return said(cudaGetLastError());
}

const char* quantize(const Quantization& q, void* stream_any) {
  const auto blocks = static_cast<unsigned>(q.tokens);
  const auto stream = static_cast<cudaStream_t>(stream_any);
  if (q.given) arrange_kernel<<<blocks, kQuantizeThreads, 0, stream>>>(q);
  else if (q.type == Type::kFloat) quantize_kernel<float><<<blocks, kQuantizeThreads, 0, stream>>>(q);
  else if (q.type == Type::kBf16) quantize_kernel<Bf16><<<blocks, kQuantizeThreads, 0, stream>>>(q);
  else quantize_kernel<Fp16><<<blocks, kQuantizeThreads, 0, stream>>>(q);
  return said(cudaGetLastError());
}

const char* multiply(const Product& product, Form form, void* stream) {
  cudaError_t error = cudaErrorInvalidValue;
  switch (form) {
    case Form::kPlain: error = start_plain(product, stream); break;
    case Form::kGemv: error = start_gemv(product, stream); break;
    case Form::kStream: error = start_stream(product, stream); break;
    case Form::kMma: error = start_mma(product, stream); break;
    case Form::kWgmma: error = start_wgmma(product, stream); break;
  }
  if (error == cudaSuccess && product.parts > 1) error = start_finish(product, stream);
  return said(error);
}

}  // namespace megaforge::bitgemm
