// Copyright © 2026 MLX Contributors

// The body of a kernel that scores one token a threadgroup, in one pass over
// both rows of logits. Metal takes this text as it is; elsewhere a prelude
// gives Metal's words their meaning.
//
// policy_logits T (N, V), reference_logits R (N, V), targets int (N),
// mask bool (N) ->
// scores float (3, N): the target's log-prob under the policy and under the
//   reference, KL(policy || reference); only the first if not DUAL;
// statistics float (4, N), for the backward pass: the policy's largest logit
//   and the log of its sum of e^(logit - largest); the reference's largest
//   logit and the mean, under the policy, of the gap defined below.

const int count = policy_logits_shape[0];
const int size = policy_logits_shape[1];
const int token = threadgroup_position_in_grid.x;
const int lid = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int group = simdgroup_index_in_threadgroup;
const int groups = THREADS / 32;
const size_t row = size_t(token) * size;
threadgroup float maxima[2][32];
threadgroup float sums[3][32];

if (!mask[token]) {  // the same for all threads: none is left at a barrier
  if (lid == 0) {
    for (int i = 0; i < (DUAL ? 3 : 1); i++) {
      scores[i * count + token] = 0.0f;
    }
    for (int i = 0; i < (DUAL ? 4 : 2); i++) {
      statistics[i * count + token] = 0.0f;
    }
  }
  return;
}

// Running maxima; sums of e^(x - x_max) and of e^(y - y_max); and the sum of
// e^(x - x_max) * gap with gap = (x - x_max) - (y - y_max), which is small
// where the two models agree, however large or shifted their logits are.
float x_max = -1e30f, y_max = -1e30f;
float x_sum = 0.0f, y_sum = 0.0f, gap_sum = 0.0f;

const int first = lid * BLOCK - ROW_SHIFT(policy_logits, row);
for (int start = first; start < size; start += THREADS * BLOCK) {
  float x[BLOCK], y[BLOCK];
  LOAD_BLOCK(policy_logits, T, row, start, size, true)
  LOAD_BLOCK(reference_logits, R, row, start, size, DUAL)
  READ_BLOCK(x, policy_logits, row, start, size)
  float top = x[0];
  for (int j = 1; j < BLOCK; j++) {
    top = metal::max(top, x[j]);
  }
  top = metal::max(top, x_max);
  float scale = metal::fast::exp(x_max - top);
  float shift = x_max - top;
  x_max = top;

  float block_sum = 0.0f;
  if (DUAL) {
    READ_BLOCK(y, reference_logits, row, start, size)
    top = y[0];
    for (int j = 1; j < BLOCK; j++) {
      top = metal::max(top, y[j]);
    }
    top = metal::max(top, y_max);
    float y_scale = metal::fast::exp(y_max - top);
    shift -= y_max - top;
    y_max = top;

    float y_block_sum = 0.0f, block_gap_sum = 0.0f;
    for (int j = 0; j < BLOCK; j++) {
      float a = x[j] - x_max, b = y[j] - y_max;
      float e = metal::fast::exp(a);
      block_sum += e;
      y_block_sum += metal::fast::exp(b);
      if (e > 0.0f) {  // -inf in both rows has no gap
        block_gap_sum += e * (a - b);
      }
    }
    if (scale > 0.0f) {
      block_gap_sum += scale * (gap_sum + x_sum * shift);
    }
    gap_sum = block_gap_sum;
    y_sum = y_sum * y_scale + y_block_sum;
  } else {
    for (int j = 0; j < BLOCK; j++) {
      block_sum += metal::fast::exp(x[j] - x_max);
    }
  }
  x_sum = x_sum * scale + block_sum;
}

// Bring every thread's sums to the row's maxima, then add them up.
float top = simd_max(x_max);
float y_top = simd_max(y_max);
if (lane == 0) {
  maxima[0][group] = top;
  maxima[1][group] = y_top;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
top = simd_max(lane < groups ? maxima[0][lane] : -1e30f);
y_top = simd_max(lane < groups ? maxima[1][lane] : -1e30f);

float scale = metal::fast::exp(x_max - top);
float shift = (x_max - top) - (y_max - y_top);
gap_sum = scale > 0.0f ? scale * (gap_sum + x_sum * shift) : 0.0f;
x_sum = simd_sum(x_sum * scale);
y_sum = simd_sum(y_sum * metal::fast::exp(y_max - y_top));
gap_sum = simd_sum(gap_sum);
if (lane == 0) {
  sums[0][group] = x_sum;
  sums[1][group] = y_sum;
  sums[2][group] = gap_sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (group > 0) {
  return;
}
x_sum = simd_sum(lane < groups ? sums[0][lane] : 0.0f);
y_sum = simd_sum(lane < groups ? sums[1][lane] : 0.0f);
gap_sum = simd_sum(lane < groups ? sums[2][lane] : 0.0f);

if (lane == 0) {
  const int target = targets[token];
  const bool known = target >= 0 && target < size;
  const float log_sum = metal::precise::log(x_sum);
  const float x_target = known ? float(policy_logits[row + target]) : NAN;
  scores[token] = (x_target - top) - log_sum;
  statistics[token] = top;
  statistics[count + token] = log_sum;
  if (DUAL) {
    const float y_target = known ? float(reference_logits[row + target]) : NAN;
    const float y_log_sum = metal::precise::log(y_sum);
    const float mean_gap = gap_sum / x_sum;
    const float kl = mean_gap + metal::precise::log(y_sum / x_sum);
    scores[count + token] = (y_target - y_top) - y_log_sum;
    scores[2 * count + token] = kl < 0.0f ? 0.0f : kl;
    statistics[2 * count + token] = y_top;
    statistics[3 * count + token] = mean_gap;
  }
}
