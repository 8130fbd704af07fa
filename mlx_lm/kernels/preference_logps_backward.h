// Copyright © 2026 MLX Contributors

// The body of a kernel that turns one token's cotangents into the gradient of
// the policy's logits, one threadgroup a token.
//
// policy_logits T (N, V), reference_logits R (N, V), targets int (N),
// mask bool (N), statistics float (4, N) of the forward pass, cotangents
// float (3, N) of its scores -> gradient T (N, V)
//
// d logp / dx(v) = [v == target] - p(v)
// d KL / dx(v) = p(v) * (log p(v) - log q(v) - KL) = p(v) * (gap(v) - mean_gap)

const int count = policy_logits_shape[0];
const int size = policy_logits_shape[1];
const int token = threadgroup_position_in_grid.x;
const int lid = thread_position_in_threadgroup.x;
const size_t row = size_t(token) * size;
const int first = lid * BLOCK - ROW_SHIFT(policy_logits, row);
float values[BLOCK];

if (!mask[token]) {
  for (int j = 0; j < BLOCK; j++) {
    values[j] = 0.0f;
  }
  for (int start = first; start < size; start += THREADS * BLOCK) {
    WRITE_BLOCK(gradient, row, start, size, values)
  }
  return;
}

const int target = targets[token];
const bool known = target >= 0 && target < size;
const float logp_cotangent = known ? cotangents[token] : NAN;
const float kl_cotangent = DUAL ? cotangents[2 * count + token] : 0.0f;
const float x_max = statistics[token];
const float log_sum = statistics[count + token];
const float y_max = DUAL ? statistics[2 * count + token] : 0.0f;
const float mean_gap = DUAL ? statistics[3 * count + token] : 0.0f;

const bool needs_reference = DUAL && kl_cotangent != 0.0f;
for (int start = first; start < size; start += THREADS * BLOCK) {
  LOAD_BLOCK(policy_logits, T, row, start, size, true)
  LOAD_BLOCK(reference_logits, R, row, start, size, needs_reference)
  READ_BLOCK(values, policy_logits, row, start, size)
  if (needs_reference) {
    float y[BLOCK];
    READ_BLOCK(y, reference_logits, row, start, size)
    for (int j = 0; j < BLOCK; j++) {
      float a = values[j] - x_max, b = y[j] - y_max;
      float p = metal::fast::exp(a - log_sum);
      float weight = kl_cotangent * ((a - b) - mean_gap) - logp_cotangent;
      values[j] = p == 0.0f ? 0.0f : p * weight;
    }
  } else {
    for (int j = 0; j < BLOCK; j++) {
      float a = values[j] - x_max;
      values[j] = -logp_cotangent * metal::fast::exp(a - log_sum);
    }
  }
  if (start <= target && target < start + BLOCK) {
    for (int j = 0; j < BLOCK; j++) {
      if (start + j == target) {
        values[j] += logp_cotangent;
      }
    }
  }
  WRITE_BLOCK(gradient, row, start, size, values)
}
