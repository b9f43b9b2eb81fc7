// Scores of patches, for one level of x86-64 (see levels.h): products of image and video attention.

namespace slotkernels::LEVEL {

template <class T>
ALWAYS_INLINE void read_as(const char* from, int64_t count, int64_t stride, float* to) {
  if (stride == sizeof(T)) {
    for_vectors(count, [&](int64_t i, int64_t part) {
      store_part(to + i, load_part(reinterpret_cast<const T*>(from) + i, part), part);
    });
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    T value[LANES] = {};
    std::memcpy(value, from + i * stride, sizeof(T));
    to[i] = load(value)[0];
  }
}

// `count` numbers that are `stride` bytes apart.
ALWAYS_INLINE void read(Storage storage, const char* from, int64_t count, int64_t stride, float* to) {
  switch (storage) {
    case Storage::FLOAT: return read_as<float>(from, count, stride, to);
    case Storage::BFLOAT: return read_as<Bfloat>(from, count, stride, to);
    case Storage::HALF: return read_as<Half>(from, count, stride, to);
  }
}

// Starts a frame: reads its video attention.
inline void read_frame(const Labelling& job, int64_t index, Frame& frame) {
  const int64_t b = index / job.frames, t = index % job.frames;
  frame.image = job.image.data + b * job.image.strides[0] + t * job.image.strides[1];
  frame.held[0] = frame.held[1] = -1;
  const int64_t* strides = job.video.strides;
  const char* from = job.video.data + b * strides[0] + t * strides[1];
  float row[MAX_OBJECTS];
  for (int64_t n = 0; n < job.slots; ++n) {
    float* out = frame.video.data() + n * frame.padded;
    std::memset(out, 0, frame.padded * sizeof(float));
    read(job.video.storage, from + n * strides[2], job.objects, strides[3], row);
    for (int64_t k = 0; k < job.objects; ++k) {
      const int64_t object = job.merged ? job.merged[b * job.objects + k] : k;
      if (object >= 0 && object < job.objects) out[object] += row[k];
    }
  }
}

// Scores of row `i` of patches, [width + 2, padded]: first and last patch twice.
inline const float* scores_of(const Labelling& job, int64_t i, Frame& frame) {
  float* scores = frame.scores[i % 2].data();
  if (frame.held[i % 2] == i) return scores;
  frame.held[i % 2] = i;
  const int64_t slots = job.slots, width = job.columns.patches, padded = frame.padded, *strides = job.image.strides;
  const bool compact = strides[2] == slots * strides[3];  // patches are contiguous: read all of them as one row
  const bool ready = compact && strides[3] == sizeof(float) && job.image.storage == Storage::FLOAT;
  for (int64_t j = 0; j < width; j += PATCHES) {
    const char* from = frame.image + (i * width + j) * strides[2];
    const float* patches = reinterpret_cast<const float*>(from);
    if (const int64_t count = std::min(PATCHES, width - j); !ready || count < PATCHES) {
      for (int64_t p = 0; p < (compact ? 1 : count); ++p) {
        const int64_t numbers = compact ? count * slots : slots;
        read(job.image.storage, from + p * strides[2], numbers, strides[3], frame.patches.data() + p * slots);
      }
      patches = frame.patches.data();
    }
    for (int64_t k = 0; k < job.objects; k += LANES) {
      Floats sums[PATCHES] = {};
      for (int64_t n = 0; n < slots; ++n) {
        const Floats video = load(frame.video.data() + n * padded + k);
        for (int64_t p = 0; p < PATCHES; ++p) sums[p] += patches[p * slots + n] * video;
      }
      for (int64_t p = 0; p < PATCHES; ++p) store(scores + (1 + j + p) * padded + k, sums[p]);
    }
  }
  std::memcpy(scores, scores + padded, padded * sizeof(float));
  std::memcpy(scores + (width + 1) * padded, scores + width * padded, padded * sizeof(float));
  return scores;
}

}  // namespace slotkernels::LEVEL
