// Agglomerative clustering of one set of slots, written once for CPUs and GPUs.
//
// The same functions run on one thread or on a group of them that work in step: `Lanes` says which of the lanes this is,
// how many there are, how they wait for each other and how they agree on the nearest of their candidates, for which all
// have to meet, too. Every lane takes every branch; loops over slots are shared out. Arithmetic and ties are those of
// SciPy's `linkage`, which scikit-learn calls: nearest-neighbour chains for complete and average linkage, Prim's
// algorithm for single linkage (Muellner 2011).
//
// Work: 3 K searches of a row of K distances and K - 1 merges of two rows, after K (K + 1) / 2 products of D numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define ON_LANES __device__ __forceinline__
#else
#define ON_LANES inline __attribute__((always_inline))
#endif

namespace slotkernels {

enum Linkage : int { COMPLETE, AVERAGE, SINGLE };

constexpr double NEVER = std::numeric_limits<double>::infinity();  // the distance of slots that may not merge

struct Nearest {
  double distance;
  int index;
};

// One thread that does the work of all.
struct OneLane {
  static constexpr int WIDTH = 1;
  static constexpr int lane = 0;
  ON_LANES void sync() const {}
  ON_LANES Nearest nearest(Nearest mine) const { return mine; }
};

struct Rule {
  int linkage;
  double threshold;  // pairs nearer than this merge
  int n_clusters;    // merging stops at so many
  int min_clusters;  // if fewer than this would be left, nothing merges
};

// The state of one problem. Rows of `distances` are `stride` apart; all other arrays hold `count` numbers.
struct Problem {
  int count, stride;
  const bool* valid;  // or null: all slots are
  double* distances;  // first the products of the slots, then their distances
  double* heights;    // of merges, in the order in which they were found; first the norms
  int* sizes;         // members of each cluster, 0 once it has become part of another; then each slot's first fellow
  int* chain;         // of nearest neighbours; then which merges hold
  int* lower;         // the two clusters that a merge joins; the second is the new one
  int* upper;

  ON_LANES double* row(int slot) const { return distances + static_cast<int64_t>(slot) * stride; }
  ON_LANES bool is_valid(int slot) const { return valid == nullptr || valid[slot]; }
};

// SciPy's formula, in its order. A slot of zeros is at distance 1 from all others, one that is not finite at infinity.
ON_LANES double cosine_distance(double product, double norm, double other_norm) {
  const double scale = norm * other_norm;
  const double cosine = scale == 0 ? product : product / scale;
  if (cosine != cosine) return NEVER;
  return 1 - (cosine > 1 ? 1 : cosine < -1 ? -1 : cosine);
}

// Turns the products of all pairs into distances. Needs a sync before and after.
template <class Lanes>
ON_LANES void distances_of_products(const Lanes& lanes, const Problem& problem) {
  for (int i = lanes.lane; i < problem.count; i += Lanes::WIDTH) {
    problem.heights[i] = sqrt(problem.row(i)[i]);
    problem.sizes[i] = problem.is_valid(i);
  }
  lanes.sync();
  for (int i = 0; i < problem.count; ++i) {
    double* row = problem.row(i);
    for (int j = i + lanes.lane; j < problem.count; j += Lanes::WIDTH) {
      const bool may_merge = i != j && problem.sizes[i] && problem.sizes[j];
      const double distance = may_merge ? cosine_distance(row[j], problem.heights[i], problem.heights[j]) : NEVER;
      row[j] = problem.row(j)[i] = distance;
    }
  }
}

template <class Lanes>
ON_LANES Nearest nearest_to(const Lanes& lanes, const Problem& problem, int slot) {
  const double* row = problem.row(slot);
  Nearest best{NEVER, problem.count};
  for (int j = lanes.lane; j < problem.count; j += Lanes::WIDTH)
    if (row[j] < best.distance) best = {row[j], j};
  return lanes.nearest(best);
}

// The distance of a cluster to the union of two others.
ON_LANES double joined(int linkage, double one, double other, double one_size, double other_size) {
  if (linkage == COMPLETE) return one > other ? one : other;
  if (linkage == SINGLE) return one < other ? one : other;
#ifdef __CUDACC__
  const double sum = __dadd_rn(__dmul_rn(one_size, one), __dmul_rn(other_size, other));
#else
  const volatile double first = one_size * one, second = other_size * other;  // SciPy's rounding: not fused with the sum
  const double sum = first + second;
#endif
  return sum / (one_size + other_size);
}

// Makes cluster `from` part of `into` and records the merge. Needs a sync after.
template <class Lanes>
ON_LANES void merge(const Lanes& lanes, const Problem& problem, int linkage, int from, int into, double height, int at) {
  const double from_size = problem.sizes[from], into_size = problem.sizes[into];
  lanes.sync();
  double *gone = problem.row(from), *kept = problem.row(into);
  for (int j = lanes.lane; j < problem.count; j += Lanes::WIDTH) {
    if (j == from) kept[j] = NEVER;
    if (j != from && j != into) {
      kept[j] = problem.row(j)[into] = joined(linkage, gone[j], kept[j], from_size, into_size);
      problem.row(j)[from] = NEVER;
    }
    gone[j] = NEVER;
  }
  if (lanes.lane == 0) {
    problem.sizes[into] += problem.sizes[from];
    problem.sizes[from] = 0;
    problem.lower[at] = from;
    problem.upper[at] = into;
    problem.heights[at] = height;
  }
}

// Complete and average linkage: follow nearest neighbours until two are each other's, and merge them. Among equals the
// previous cluster of the chain comes first, then the one of the lowest index; a new cluster has the higher index of its
// two parts, and the rest of the chain is kept. Returns the number of merges.
template <class Lanes>
ON_LANES int merge_along_chains(const Lanes& lanes, const Problem& problem, int linkage) {
  int merges = 0;
  for (int length = 0, start = 0;;) {
    if (length == 0) {
      while (start < problem.count && problem.sizes[start] == 0) ++start;
      if (start == problem.count) return merges;
      if (lanes.lane == 0) problem.chain[0] = start;
      length = 1;
      lanes.sync();
    }
    const int last = problem.chain[length - 1];
    const int previous = length > 1 ? problem.chain[length - 2] : last;
    const double limit = problem.row(last)[previous];  // infinite for a chain of one
    const Nearest found = nearest_to(lanes, problem, last);
    if (found.distance < limit) {
      if (length == problem.count) length = 0;  // only if rounding of averages put a cluster into it twice
      if (lanes.lane == 0) problem.chain[length] = found.index;
      ++length;
    } else if (limit < NEVER) {
      const int from = last < previous ? last : previous, into = last < previous ? previous : last;
      merge(lanes, problem, linkage, from, into, limit, merges++);
      length -= 2;
    } else {  // nothing is left that it may merge with
      if (lanes.lane == 0) problem.sizes[last] = 0;
      --length;
    }
    lanes.sync();
  }
}

// Single linkage: a tree grows from the first slot, always by the nearest slot. Edges join the slot that came last and
// the new one, which after sorting gives the same clusters as the true edges. Returns the number of merges.
template <class Lanes>
ON_LANES int merge_along_tree(const Lanes& lanes, const Problem& problem) {
  int merges = 0;
  for (int start = 0, last = -1;;) {
    if (last < 0) {
      while (start < problem.count && problem.sizes[start] == 0) ++start;
      if (start == problem.count) return merges;
      last = start;
    }
    const Nearest found = nearest_to(lanes, problem, last);
    if (found.distance < NEVER) {
      merge(lanes, problem, SINGLE, last, found.index, found.distance, merges++);
      last = found.index;
    } else {
      if (lanes.lane == 0) problem.sizes[last] = 0;
      last = -1;
    }
    lanes.sync();
  }
}

// Whether each merge is among the lowest that the rule asks for; equal heights count in the order they were found.
template <class Lanes>
ON_LANES int choose_merges(const Lanes& lanes, const Problem& problem, const Rule& rule, int merges) {
  int valid = 0, chosen = 0;
  for (int i = 0; i < problem.count; ++i) valid += problem.is_valid(i);
  for (int i = lanes.lane; i < merges; i += Lanes::WIDTH) {
    const double height = problem.heights[i];
    const bool below = height < rule.threshold;
    int rank = 0;
    for (int j = 0; below && j < merges; ++j)
      rank += problem.heights[j] < height || (problem.heights[j] == height && j < i);
    problem.chain[i] = below && rank < valid - rule.n_clusters;
  }
  lanes.sync();
  for (int i = 0; i < merges; ++i) chosen += problem.chain[i];
  return valid - chosen < rule.min_clusters ? 0 : chosen;
}

// Clusters one problem, whose distances are known: labels of its slots in the order of first members, -1 for those that
// are not valid, and how many clusters there are.
template <class Lanes>
ON_LANES void cluster(const Lanes& lanes, const Problem& problem, const Rule& rule, int64_t* labels, int64_t* clusters) {
  const int merges = rule.linkage == SINGLE ? merge_along_tree(lanes, problem)
                                            : merge_along_chains(lanes, problem, rule.linkage);
  const int chosen = choose_merges(lanes, problem, rule, merges);
  int* first = problem.sizes;
  for (int i = lanes.lane; i < problem.count; i += Lanes::WIDTH) first[i] = i;
  for (int at = 0; at < merges && chosen > 0; ++at) {
    if (!problem.chain[at]) continue;
    lanes.sync();
    const int one = first[problem.lower[at]], other = first[problem.upper[at]];
    const int low = one < other ? one : other;
    lanes.sync();
    for (int i = lanes.lane; i < problem.count; i += Lanes::WIDTH)
      if (first[i] == one || first[i] == other) first[i] = low;
  }
  lanes.sync();
  if (lanes.lane != 0) return;
  int64_t found = 0;
  for (int i = 0; i < problem.count; ++i)
    labels[i] = !problem.is_valid(i) ? -1 : first[i] == i ? found++ : labels[first[i]];
  *clusters = found;
}

}  // namespace slotkernels
