// The merge of partial attention over disjoint sets of keys, and its gradient, row by row. Knows no
// torch. What it computes: attnengine/merge.py.
//
// Rows are independent and each is computed by one task in one order, so results depend on neither
// the number of threads nor where a row lies.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "isa.h"
#include "layout.h"
#include "reduce.h"

namespace ae {

// Strides for a new dense tensor of `size` whose leading dimensions lie in memory in the order of
// `like`, the last innermost: dense_strides_like at any rank. Stride 0 counts as outermost.
inline void dense_strides_of_rank(const int64_t* like, const int64_t* size, int64_t rank,
                                  int64_t* stride) {
  int64_t order[AE_MAX_RANK];
  const auto weight = [like](int64_t d) {
    return like[d] == 0 ? std::numeric_limits<int64_t>::max() : like[d];
  };
  for (int64_t i = 0; i < rank - 1; ++i) {
    int64_t j = i;
    for (; j > 0 && weight(order[j - 1]) < weight(i); --j) order[j] = order[j - 1];
    order[j] = i;
  }
  stride[rank - 1] = 1;
  int64_t step = size[rank - 1] > 0 ? size[rank - 1] : 1;
  for (int64_t i = rank - 2; i >= 0; --i) {
    stride[order[i]] = step;
    step *= size[order[i]] > 0 ? size[order[i]] : 1;
  }
}

// A tensor of rows: where row (i0, i1, ...) begins. Elements of a row are consecutive.
struct Rows {
  void* data = nullptr;
  int64_t stride[AE_MAX_RANK] = {};

  template <class T>
  T* at(const int64_t* index, int64_t dims) const {
    int64_t offset = 0;
    for (int64_t d = 0; d < dims; ++d) offset += index[d] * stride[d];
    return static_cast<T*>(data) + offset;
  }
};

struct MergePart {
  Rows out, lse;    // given
  Rows dout, dlse;  // backward: this part's gradients, written
};

struct Merge {
  int64_t dims;  // leading dimensions, all but the last of out
  int64_t size[AE_MAX_RANK];
  int64_t rows, depth;
  int32_t dtype;
  std::vector<MergePart> parts;
  Rows out, lse;  // forward: written; backward: the gradients of both

  static constexpr int64_t kTaskElements = 16384;  // read by one task: about 5 us
  int64_t rows_of_task() const {
    const int64_t row = depth * static_cast<int64_t>(parts.size()) + 1;
    return row < kTaskElements ? kTaskElements / row : 1;
  }
  int64_t tasks() const { return (rows + rows_of_task() - 1) / rows_of_task(); }
};

// The softmax of the parts' lse, and its logarithm of the sum. Parts at -inf are absent: weight 0,
// and no other part's weight depends on them. NaN or +inf makes every weight of the row NaN.
template <class Sum>
Sum merge_weights(const Sum* lse, size_t count, Sum* weight) {
  constexpr Sum kInf = std::numeric_limits<Sum>::infinity();
  Sum top = -kInf;
  for (size_t i = 0; i < count; ++i) {
    if (lse[i] > top || std::isnan(lse[i])) top = lse[i];  // NaN stays: nothing is above it
  }
  Sum sum = 0;
  for (size_t i = 0; i < count; ++i) {
    weight[i] = lse[i] == -kInf ? Sum(0) : std::exp(lse[i] - top);
    sum += weight[i];
  }
  if (top == -kInf) return top;
  for (size_t i = 0; i < count; ++i) weight[i] /= sum;
  return top == kInf ? top : top + std::log(sum);
}

// Rows are worked on in blocks of 16 elements, a fixed count, so that compilers vectorize; partial
// sums stay in memory, where two additions to one of them are several blocks apart.
inline constexpr int64_t kMergeLanes = 16;
inline constexpr int64_t kMergeStep = 256;  // elements whose sums are kept at a time

// to[l] = f(l) for a block. Through a buffer: compilers have to assume that `to` overlaps inputs.
template <class T, class F>
void write_block(T* to, const F& f) {
  T block[kMergeLanes];
  for (int64_t l = 0; l < kMergeLanes; ++l) block[l] = f(l);
  std::memcpy(to, block, sizeof(block));
}

// out[j] = sum over parts of weight * row[j], in index order.
template <class Format>
void merge_rows(const typename Format::Element* const* row, const typename Format::Sum* weight,
                size_t count, int64_t depth, typename Format::Element* out) {
  using Sum = typename Format::Sum;
  for (int64_t start = 0; start < depth; start += kMergeStep) {
    const int64_t n = depth - start < kMergeStep ? depth - start : kMergeStep;
    const int64_t whole = n / kMergeLanes * kMergeLanes;
    Sum sum[kMergeStep];
    for (int64_t j = 0; j < n; ++j) sum[j] = 0;
    for (size_t i = 0; i < count; ++i) {
      const auto* from = row[i] + start;
      const Sum w = weight[i];
      for (int64_t j = 0; j < whole; j += kMergeLanes) {
        for (int64_t l = 0; l < kMergeLanes; ++l) sum[j + l] += w * Format::read(from[j + l]);
      }
      for (int64_t j = whole; j < n; ++j) sum[j] += w * Format::read(from[j]);
    }
    auto* to = out + start;
    for (int64_t j = 0; j < whole; j += kMergeLanes) {
      write_block(to + j, [&](int64_t l) { return Format::write(sum[j + l]); });
    }
    for (int64_t j = whole; j < n; ++j) to[j] = Format::write(sum[j]);
  }
}

template <class Format>
typename Format::Sum row_product(const typename Format::Element* a,
                                 const typename Format::Element* b, int64_t depth) {
  constexpr int64_t kSums = 4 * kMergeLanes;
  typename Format::Sum sum[kSums] = {};
  int64_t j = 0;
  for (; j + kMergeLanes <= depth; j += kMergeLanes) {
    auto* to = sum + j % kSums;
    for (int64_t l = 0; l < kMergeLanes; ++l) {
      to[l] += Format::read(a[j + l]) * Format::read(b[j + l]);
    }
  }
  for (; j < depth; ++j) sum[0] += Format::read(a[j]) * Format::read(b[j]);
  for (int64_t width = kSums / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) sum[l] += sum[l + width];
  }
  return sum[0];
}

template <class Format>
void scale_row(const typename Format::Element* from, typename Format::Sum factor, int64_t depth,
               typename Format::Element* to) {
  int64_t j = 0;
  for (; j + kMergeLanes <= depth; j += kMergeLanes) {
    write_block(to + j,
                [&](int64_t l) { return Format::write(factor * Format::read(from[j + l])); });
  }
  for (; j < depth; ++j) to[j] = Format::write(factor * Format::read(from[j]));
}

// Rows [begin, end) of a merge, or of its gradient. The live parts of a row are packed to the
// front, so that a dead one is not read at all: it may hold anything.
template <class Format, bool kBackward>
class MergeTask {
 public:
  using Element = typename Format::Element;
  using Sum = typename Format::Sum;

  explicit MergeTask(const Merge& merge)
      : m_(merge), lse_(merge.parts.size()), weight_(lse_), product_(lse_), live_(lse_.size()) {}

  void run(int64_t begin, int64_t end) {
    int64_t index[AE_MAX_RANK];
    int64_t rest = begin;
    for (int64_t d = m_.dims - 1; d >= 0; --d) {
      index[d] = rest % m_.size[d];
      rest /= m_.size[d];
    }
    for (int64_t row = begin; row < end; ++row) {
      for (size_t i = 0; i < lse_.size(); ++i) {
        lse_[i] = *m_.parts[i].lse.template at<Sum>(index, m_.dims);
      }
      const Sum lse = merge_weights(lse_.data(), lse_.size(), weight_.data());
      if constexpr (kBackward) {
        backward(index);
      } else {
        forward(index, lse);
      }
      for (int64_t d = m_.dims - 1; d >= 0 && ++index[d] == m_.size[d]; --d) index[d] = 0;
    }
  }

 private:
  bool is_live(size_t i) const { return lse_[i] != -std::numeric_limits<Sum>::infinity(); }

  void forward(const int64_t* index, Sum lse) {
    size_t live = 0;
    for (size_t i = 0; i < lse_.size(); ++i) {
      if (!is_live(i)) continue;
      live_[live] = m_.parts[i].out.template at<Element>(index, m_.dims);
      weight_[live++] = weight_[i];
    }
    merge_rows<Format>(live_.data(), weight_.data(), live, m_.depth,
                       m_.out.template at<Element>(index, m_.dims));
    *m_.lse.template at<Sum>(index, m_.dims) = lse;
  }

  void backward(const int64_t* index) {
    const Element* dout = m_.out.template at<Element>(index, m_.dims);
    Sum mean = 0;  // dout . out, from the parts: out as it was before it was rounded
    for (size_t i = 0; i < lse_.size(); ++i) {
      if (!is_live(i)) continue;
      const Element* out = m_.parts[i].out.template at<Element>(index, m_.dims);
      product_[i] = row_product<Format>(dout, out, m_.depth);
      mean += weight_[i] * product_[i];
    }
    const Sum dlse = *m_.lse.template at<Sum>(index, m_.dims);
    for (size_t i = 0; i < lse_.size(); ++i) {
      const MergePart& part = m_.parts[i];
      Element* to = part.dout.template at<Element>(index, m_.dims);
      Sum* to_lse = part.dlse.template at<Sum>(index, m_.dims);
      if (is_live(i)) {
        scale_row<Format>(dout, weight_[i], m_.depth, to);
        *to_lse = weight_[i] * (product_[i] - mean + dlse);
      } else {
        for (int64_t j = 0; j < m_.depth; ++j) to[j] = Format::write(0);
        *to_lse = 0;
      }
    }
  }

  const Merge& m_;
  std::vector<Sum> lse_, weight_, product_;
  std::vector<const Element*> live_;
};

// The same code for the vectors of any x86-64, and for those of AVX2: rows that lie in a cache come
// faster than the narrow ones take them.
template <class Format, bool kBackward>
void merge_range(const Merge& m, int64_t begin, int64_t end) {
  MergeTask<Format, kBackward>(m).run(begin, end);
}
template <class Format, bool kBackward>
#if defined(__x86_64__)
__attribute__((target("avx2,fma"), flatten))
#endif
void merge_range_avx2(const Merge& m, int64_t begin, int64_t end) {
  MergeTask<Format, kBackward>(m).run(begin, end);
}

template <bool kBackward>
void run_merge_task(void* arg, int64_t task, int32_t /*worker*/) {
  using Range = void (*)(const Merge&, int64_t, int64_t);
  static constexpr Range kRanges[2][4] = {
      {merge_range<Numbers<float>, kBackward>, merge_range<Numbers<double>, kBackward>,
       merge_range<Bf16Bits, kBackward>, merge_range<F16Bits, kBackward>},
      {merge_range_avx2<Numbers<float>, kBackward>, merge_range_avx2<Numbers<double>, kBackward>,
       merge_range_avx2<Bf16Bits, kBackward>, merge_range_avx2<F16Bits, kBackward>}};
  static const bool wide = cpu_isa() >= AE_ISA_AVX2;
  const Merge& m = *static_cast<const Merge*>(arg);
  const int64_t begin = task * m.rows_of_task();
  const int64_t end = begin + m.rows_of_task() < m.rows ? begin + m.rows_of_task() : m.rows;
  kRanges[wide ? 1 : 0][m.dtype](m, begin, end);
}

}  // namespace ae
