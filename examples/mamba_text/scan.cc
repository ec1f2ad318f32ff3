// The selective scan of Mamba and its gradient, on float32, for training.
//
//     h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t],   y[t] = C[t] h[t] + D u[t]
//
// (Gu and Dao, arXiv 2312.00752, section 3.2; the discretisation of B as in their code). Shapes: u,
// dt, y [batch, channels, time]; A [channels, STATE]; B, C [batch, time, STATE]; D [channels].
// Threads share out the batch, so that none writes what another one writes.

#include <cmath>
#include <vector>

constexpr int STATE = 16;

extern "C" void scan_forward(int batch, int channels, int time, const float* u, const float* dt,
                             const float* A, const float* B, const float* C, const float* D,
                             float* y) {
#pragma omp parallel for schedule(dynamic)
  for (int b = 0; b < batch; ++b) {
    const float *Bb = B + (long)b * time * STATE, *Cb = C + (long)b * time * STATE;
    for (int d = 0; d < channels; ++d) {
      const long row = ((long)b * channels + d) * time;
      const float* a = A + d * STATE;
      float h[STATE] = {};
      for (int t = 0; t < time; ++t) {
        const float step = dt[row + t], x = u[row + t];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int n = 0; n < STATE; ++n) {
          h[n] = std::exp(step * a[n]) * h[n] + step * x * Bb[t * STATE + n];
          sum += h[n] * Cb[t * STATE + n];
        }
        y[row + t] = sum + D[d] * x;
      }
    }
  }
}

// Gradients of A and D come out for every sample of the batch: gA [batch, channels, STATE], gD
// [batch, channels]. gB and gC must be zero before.
extern "C" void scan_backward(int batch, int channels, int time, const float* u, const float* dt,
                              const float* A, const float* B, const float* C, const float* D,
                              const float* gy, float* gu, float* gdt, float* gA, float* gB,
                              float* gC, float* gD) {
#pragma omp parallel for schedule(dynamic)
  for (int b = 0; b < batch; ++b) {
    const float *Bb = B + (long)b * time * STATE, *Cb = C + (long)b * time * STATE;
    float *gBb = gB + (long)b * time * STATE, *gCb = gC + (long)b * time * STATE;
    std::vector<float> states((long)(time + 1) * STATE), decays((long)time * STATE);
    for (int d = 0; d < channels; ++d) {
      const long row = ((long)b * channels + d) * time;
      const float* a = A + d * STATE;
      for (int t = 0; t < time; ++t) {
        const float step = dt[row + t], x = u[row + t];
        const float* before = &states[(long)t * STATE];
        float *after = &states[(long)(t + 1) * STATE], *decay = &decays[(long)t * STATE];
#pragma omp simd
        for (int n = 0; n < STATE; ++n) {
          decay[n] = std::exp(step * a[n]);
          after[n] = decay[n] * before[n] + step * x * Bb[t * STATE + n];
        }
      }
      float carry[STATE] = {}, sumA[STATE] = {}, sumD = 0;
      for (int t = time - 1; t >= 0; --t) {
        const float step = dt[row + t], x = u[row + t], g = gy[row + t];
        const float *before = &states[(long)t * STATE], *after = before + STATE;
        const float* decay = &decays[(long)t * STATE];
        float ofB = 0, ofA = 0;
#pragma omp simd reduction(+ : ofB, ofA)
        for (int n = 0; n < STATE; ++n) {
          const float gh = carry[n] + g * Cb[t * STATE + n];
          gCb[t * STATE + n] += g * after[n];
          gBb[t * STATE + n] += gh * step * x;
          const float decayed = gh * decay[n];
          sumA[n] += decayed * before[n] * step;
          ofA += decayed * before[n] * a[n];
          ofB += gh * Bb[t * STATE + n];
          carry[n] = decayed;
        }
        gdt[row + t] = ofA + ofB * x;
        gu[row + t] = ofB * step + g * D[d];
        sumD += g * x;
      }
      for (int n = 0; n < STATE; ++n) gA[((long)b * channels + d) * STATE + n] = sumA[n];
      gD[(long)b * channels + d] = sumD;
    }
  }
}
