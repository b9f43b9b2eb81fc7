// Schemas of the compiled ops, all in one place. Python reaches them as torch.ops.slotkernels_native.<name> through
// slotkernels/_native.py. The public ops, their checks and their gradients are in kernels/slotkernels/<op>/op.py.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(slotkernels_native, m) {
  // float32 slots and a mask, both contiguous; linkage 0, 1, 2 is complete, average, single. Labels and counts.
  m.def(
      "cluster_slots(Tensor slots, Tensor? mask, float threshold, int n_clusters, int linkage, int min_clusters) -> "
      "(Tensor, Tensor)");
  // As in kernels/slotkernels/slot_attention/reference.py; float32, contiguous (k and v: within each sample).
  m.def(
      "inverted_attention(Tensor q, Tensor k, Tensor? v, Tensor? bias, Tensor? mask, float scale, float weight_eps, "
      "float total_eps, int groups, bool return_attention) -> (Tensor, Tensor, Tensor)");
  m.def(
      "inverted_attention_backward(Tensor? grad_updates, Tensor? grad_total, Tensor? grad_attention, Tensor q, Tensor k, "
      "Tensor? v, Tensor? bias, Tensor? mask, float scale, float weight_eps, float total_eps, int groups, "
      "Tensor updates, Tensor total, Tensor? attention, bool need_q, bool need_k, bool need_v, bool need_bias) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // The steps between the two products of inverted attention, for bfloat16 or float16. Statistics and attention are
  // float32, and all tensors are contiguous. The products (logits and grad_weights) are [B, M, N], all else is [B, N,
  // M].
  m.def(
      "attention_weights(Tensor logits, Tensor? bias, Tensor? mask, float scale, float weight_eps, float total_eps, "
      "int groups, bool return_attention) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_weights_backward(Tensor grad_weights, Tensor grad_updates, Tensor? grad_total, Tensor? grad_attention, "
      "Tensor updates, Tensor total, Tensor attention, Tensor? mask, float scale, float weight_eps, int groups, "
      "bool need_weights, bool need_bias) -> (Tensor, Tensor, Tensor)");
  // The layer norm of its tokens: any 16- or 32-bit floats in and out, float32 statistics, all contiguous.
  m.def("token_norm(Tensor tokens, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def("token_norm_backward(Tensor grad, Tensor tokens, Tensor mean, Tensor rstd) -> Tensor");
  // As in kernels/slotkernels/invariant_slot_attention/reference.py; float32, and all contiguous.
  m.def(
      "invariant_attention(Tensor q, Tensor bias, Tensor k, Tensor v, Tensor frame, Tensor grid, Tensor positions, "
      "Tensor scales, Tensor? shift, Tensor? key_deviation, Tensor? value_deviation, Tensor? mask, float scale, "
      "float scale_factor, float eps, bool denominator, float scale_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "invariant_attention_backward(Tensor? grad_updates, Tensor? grad_attention, Tensor? grad_weights, "
      "Tensor? grad_positions, Tensor? grad_scales, Tensor q, Tensor bias, Tensor k, Tensor v, Tensor frame, "
      "Tensor grid, Tensor positions, Tensor scales, Tensor? shift, Tensor? key_deviation, Tensor? value_deviation, "
      "Tensor? mask, float scale, float scale_factor, float eps, bool denominator, float scale_eps, Tensor attention, "
      "Tensor weights, Tensor new_positions, Tensor new_scales, bool need_q, bool need_bias, bool need_k, bool need_v, "
      "bool need_frame, bool need_grid, bool need_positions, bool need_scales, bool need_shift, "
      "bool need_key_deviation, bool need_value_deviation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  // Arguments and results as in kernels/slotkernels/sinkhorn/reference.py; float32 results, any 16- or 32-bit float in.
  m.def(
      "sinkhorn(Tensor x, Tensor y, Tensor? a, Tensor? b, float? diameter, bool per_problem, int p, float blur, "
      "float scaling, float? reach, bool debias, bool potentials, bool keep_x, bool keep_y) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sinkhorn_backward(Tensor? grad_value, Tensor? grad_f, Tensor? grad_g, Tensor x, Tensor y, Tensor? a, Tensor? b, "
      "Tensor? pull_x, Tensor? pull_y) -> (Tensor, Tensor)");
  // As in kernels/slotkernels/transport_plan/problem.py, and with a tolerance the error of the columns [1]; any float
  // in, the plan float64 for float64 costs, else float32.
  m.def(
      "transport_plan(Tensor cost, Tensor? a, Tensor? b, float eps, int iterations, float? tolerance, bool keep) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // As in csrc/cpu/streaming.h: float32 and contiguous; n and m are the numbers of points without padding.
  m.def(
      "streaming_sums(Tensor x, Tensor panels, Tensor r, Tensor s, Tensor a, Tensor b, Tensor scale, int n, int m, "
      "int p, bool same) -> (Tensor, Tensor)");
  m.def(
      "streaming_slopes(Tensor x, Tensor y, Tensor panels, Tensor r, Tensor s, Tensor b, Tensor scale, int n, int m, "
      "int p) -> (Tensor, Tensor)");

  // As in kernels/slotkernels/slot_update/reference.py; any 16- or 32-bit float in, statistics and affine float32, and
  // all contiguous.
  m.def(
      "gru_norm(Tensor gates_input, Tensor gates_hidden, Tensor slots, Tensor weight, Tensor bias, float norm_eps) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gru_norm_backward(Tensor? grad_slots, Tensor? grad_normalised, Tensor gates_input, Tensor gates_hidden, "
      "Tensor slots, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_norm(Tensor slots, Tensor update, Tensor weight, Tensor bias, float norm_eps) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_norm_backward(Tensor? grad_total, Tensor grad_normalised, Tensor total, Tensor weight, Tensor mean, "
      "Tensor rstd) -> (Tensor, Tensor, Tensor)");
  // As in kernels/slotkernels/propagation/reference.py; any 16- or 32-bit float in.
  m.def(
      "propagate_labels(Tensor image_attention, Tensor video_attention, Tensor? labels, int height, int width, "
      "int out_height, int out_width, bool confidence, bool statistics) -> (Tensor, Tensor, Tensor, Tensor)");
  // As in kernels/slotkernels/guided_labels/reference.py; any 16- or 32-bit float in, and frames of bytes.
  m.def(
      "guided_labels(Tensor image_attention, Tensor video_attention, Tensor? labels, Tensor guide, int height, "
      "int width, int window, float epsilon, int subsample, bool confidence, bool statistics) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
