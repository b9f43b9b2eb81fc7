// Rows of labels, for one level of x86-64 (see levels.h).

namespace slotkernels::LEVEL {

constexpr float INF = std::numeric_limits<float>::infinity();
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

// Converts numbers 0..255 in two steps: GCC splits a conversion from 32 to 8 bits into single numbers.
ALWAYS_INLINE Bytes to_bytes(Ints value) {
  return __builtin_convertvector(__builtin_convertvector(value, Shorts), Bytes);
}

template <class Vector>
ALWAYS_INLINE void put(void* to, Vector value) {
  std::memcpy(to, &value, sizeof(value));
}

// Adds row `y` of labels to areas and boxes (x0, y0, x1, y1; ends excluded), run by run. Reads 8 bytes past the row.
inline void count_row(const uint8_t* labels, int64_t pixels, int64_t y, int32_t* areas, int32_t* boxes) {
  for (int64_t begin = 0, end = 0; begin < pixels; begin = end) {
    const int64_t label = labels[begin];
    for (uint64_t word, other = 0; !other && end < pixels; end += other ? __builtin_ctzll(other) / 8 : 8) {
      std::memcpy(&word, labels + end, sizeof(word));
      other = word ^ label * 0x0101010101010101u;
    }
    end = std::min(end, pixels);
    int32_t* box = boxes + 4 * label;
    if (areas[label] == 0) box[0] = static_cast<int32_t>(begin), box[1] = static_cast<int32_t>(y);
    areas[label] += static_cast<int32_t>(end - begin);
    box[0] = std::min(box[0], static_cast<int32_t>(begin));
    box[2] = std::max(box[2], static_cast<int32_t>(end));
    box[3] = static_cast<int32_t>(y) + 1;
  }
}

}  // namespace slotkernels::LEVEL
