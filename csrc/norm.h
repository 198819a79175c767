// Residual add and LayerNorm of rows, and their backward. Included once per target.

// Minimum number of elements per thread.
inline constexpr int64_t kNormGrain = 1 << 14;

// Minimum rows per chunk and maximum number of chunks. Gradients are summed per chunk, so the order of summation depends on the
// number of rows, not on the number of threads.
inline constexpr int64_t kNormRows = 32, kNormChunks = 64;

inline int64_t norm_grain(int64_t numbers) { return std::max<int64_t>(1, kNormGrain / std::max<int64_t>(numbers, 1)); }

// A whole vector of a row.
struct WholeVec {
  Vec read(const float* p) const { return load(p); }
  Vec keep(Vec x) const { return x; }
};
// The rest of a row after its whole vectors, with zeros in the other lanes.
struct PartOfVec {
  int64_t lanes;

  Vec read(const float* p) const {
    Vec x = splat(0.0f);
    std::memcpy(&x, p, lanes * sizeof(float));
    return x;
  }
  Vec keep(Vec x) const { return read(reinterpret_cast<const float*>(&x)); }
};

// Calls f(vec, first, j) for the vectors of a row. The vector is added to the j-th of kSums independent sums.
inline constexpr int kSums = 4;
template <class F>
inline void over_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes)
    MOPE_UNROLL for (int j = 0; j < kSums; ++j) f(WholeVec(), i + j * kLanes, j);
  for (; i + kLanes <= n; i += kLanes) f(WholeVec(), i, 0);
  if (i < n) f(PartOfVec{n - i}, i, 0);
}

inline float sum_up(const Vec (&sum)[kSums]) { return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])); }

// A given row, or n copies of `number`.
struct RowOr {
  RowOr(const float* given, int64_t n, float number) : filled(given ? 0 : n, number), data(given ? given : filled.data()) {}
  RowOr(const RowOr&) = delete;
  std::vector<float> filled;
  const float* data;
};

// A LayerNorm of rows of `width` elements.
struct Norm {
  Norm(int64_t width, float eps, const float* weight, const float* bias)
      : width(width), eps(eps), weight(weight, width, 1.0f), bias(bias, width, 0.0f) {}

  struct Moments {
    float mean, inverse_std;
  };
  // Uses two passes over the cached row, because squares of deviations from the mean do not cancel.
  Moments moments(const float* row) const {
    Vec sum[kSums] = {}, squares[kSums] = {};
    over_vectors(width, [&](auto vec, int64_t i, int j) { sum[j] += vec.read(row + i); });
    const float mean = sum_up(sum) / width;
    over_vectors(width, [&](auto vec, int64_t i, int j) {
      const Vec x = vec.keep(vec.read(row + i) - splat(mean));
      squares[j] += x * x;
    });
    return {mean, 1.0f / std::sqrt(sum_up(squares) / width + eps)};
  }

  void forward(const float* MOPE_RESTRICT row, float* MOPE_RESTRICT to) const {
    const Moments of = moments(row);
    const float *MOPE_RESTRICT scale = weight.data, *MOPE_RESTRICT shift = bias.data;
    MOPE_SIMD for (int64_t i = 0; i < width; ++i) to[i] = (row[i] - of.mean) * of.inverse_std * scale[i] + shift[i];
  }

  // to = the gradient of a row: the gradient `grad` of its LayerNorm, propagated to the row, plus the direct gradients `first` and
  // `second`. The row's contributions to the gradients of weight and bias are added to the sums, unless these are null.
  void backward(
      const float* row, const float* MOPE_RESTRICT grad, const float* MOPE_RESTRICT first, const float* MOPE_RESTRICT second,
      float* MOPE_RESTRICT to, float* MOPE_RESTRICT weight_sum, float* MOPE_RESTRICT bias_sum) const {
    const Moments of = moments(row);
    const float* MOPE_RESTRICT scale = weight.data;
    if (weight_sum)
      MOPE_SIMD for (int64_t i = 0; i < width; ++i) weight_sum[i] += grad[i] * ((row[i] - of.mean) * of.inverse_std);
    if (bias_sum)
      MOPE_SIMD for (int64_t i = 0; i < width; ++i) bias_sum[i] += grad[i];
    if (!to) return;
    Vec sum[kSums] = {}, along[kSums] = {};
    over_vectors(width, [&](auto vec, int64_t i, int j) {
      const Vec g = vec.read(grad + i) * vec.read(scale + i);
      sum[j] += g;
      along[j] += g * (of.inverse_std * (vec.read(row + i) - splat(of.mean)));
    });
    const float common = sum_up(sum) / width, slope = sum_up(along) / width;
    MOPE_SIMD for (int64_t i = 0; i < width; ++i) {
      const float through = grad[i] * scale[i] - common - (row[i] - of.mean) * of.inverse_std * slope;
      to[i] = of.inverse_std * through + first[i] + second[i];
    }
  }

  int64_t width;
  float eps;
  RowOr weight, bias;
  const std::vector<float> zeros = std::vector<float>(width);
};

// Lets f write n floats directly to a row of `to` if its type is float. Otherwise f writes to `scratch`, which is then converted.
template <int kDims, class F, class... Index>
inline void write_row(const AnyOutput<kDims>& to, int64_t n, float* scratch, const F& f, Index... index) {
  if (!to.is_bfloat16) return f(to.template as<float>().row(index...));
  f(scratch);
  put_row(scratch, n, to, index...);
}

// The same for two optional rows. f gets nullptr if both are missing.
template <int kDims, class F, class... Index>
inline void write_both(
    const AnyOutput<kDims>& first, const AnyOutput<kDims>& second, int64_t n, float* scratch, const F& f, Index... index) {
  if (first && !second) return write_row(first, n, scratch, f, index...);
  f(second ? scratch : nullptr);
  if (first) put_row(scratch, n, first, index...);
  if (second) put_row(scratch, n, second, index...);
}

// Scratch memory of a thread for rows that are not float.
struct NormScratch {
  explicit NormScratch(int64_t width)
      : memory(4 * Scratch::padded(width)),
        x(memory.take(width)),
        update(memory.take(width)),
        total(memory.take(width)),
        out(memory.take(width)) {}
  Scratch memory;
  float *x, *update, *total, *out;
};

// total = x + update, or a copy of x. Returns the row as stored in total, after rounding.
template <int kDims, class... Index>
inline const float* add_row(
    const float* x, const float* update, int64_t n, const AnyOutput<kDims>& total, NormScratch& scratch, Index... index) {
  write_row(
      total, n, scratch.total,
      [&](float* MOPE_RESTRICT to) {
        if (!update) return void(std::copy_n(x, n, to));
        MOPE_SIMD for (int64_t i = 0; i < n; ++i) to[i] = x[i] + update[i];
      },
      index...);
  if (!total.is_bfloat16) return total.template as<float>().row(index...);
  convert(total.template as<BFloat16>().row(index...), n, scratch.total);
  return scratch.total;
}

inline void add_norm(const AddNorm& op, AnyOutput<2> total, AnyOutput<2> normed) {
  const Norm norm(op.C, op.eps, op.weight, op.bias);
  parallel_for(0, op.R, norm_grain(op.C), [&](int64_t begin, int64_t end) {
    NormScratch scratch(op.C);
    for (int64_t r = begin; r < end; ++r) {
      const float* row = floats(op.x, op.C, scratch.x, r);
      if (op.update) row = add_row(row, floats(op.update, op.C, scratch.update, r), op.C, total, scratch, r);
      write_row(normed, op.C, scratch.out, [&](float* to) { norm.forward(row, to); }, r);
    }
  });
}

// Calls f(row, weight_sum, bias_sum, scratch) for every row. The sums are added to weight and bias, unless these are null.
template <class F>
inline void over_norm_rows(int64_t rows, int64_t width, float* weight, float* bias, const F& f) {
  const int64_t of_chunk = std::max(kNormRows, (rows + kNormChunks - 1) / kNormChunks), chunks = (rows + of_chunk - 1) / of_chunk;
  std::vector<float> weights(weight ? chunks * width : 0), biases(bias ? chunks * width : 0);
  parallel_for(0, chunks, norm_grain(of_chunk * width), [&](int64_t begin, int64_t end) {
    NormScratch scratch(width);
    for (int64_t r = begin * of_chunk; r < std::min(end * of_chunk, rows); ++r) {
      const int64_t place = r / of_chunk * width;
      f(r, weight ? weights.data() + place : nullptr, bias ? biases.data() + place : nullptr, scratch);
    }
  });
  for (int64_t c = 0; c < chunks; ++c) {
    if (weight) add_scaled(weight, 1.0f, weights.data() + c * width, width);
    if (bias) add_scaled(bias, 1.0f, biases.data() + c * width, width);
  }
}

// The gradient of a row, from the gradients of its LayerNorm, of the row itself, and one shared by all rows of an item, or nullptr.
inline void norm_row_backward(
    const Norm& norm, const float* row, const float* grad_normed, const float* grad_total, const float* shared, float* to,
    float* weight_sum, float* bias_sum) {
  const float *first = grad_total ? grad_total : norm.zeros.data(), *second = shared ? shared : norm.zeros.data();
  if (grad_normed) return norm.backward(row, grad_normed, first, second, to, weight_sum, bias_sum);
  if (to)
    MOPE_SIMD for (int64_t i = 0; i < norm.width; ++i) to[i] = first[i] + second[i];
}

inline void add_norm_backward(const AddNorm& op, const AddNormBackward& back) {
  const Norm norm(op.C, op.eps, op.weight, nullptr);
  for (float* sum : {back.weight, back.bias})
    if (sum) std::fill_n(sum, op.C, 0.0f);
  over_norm_rows(op.R, op.C, back.weight, back.bias, [&](int64_t r, float* weight_sum, float* bias_sum, NormScratch& scratch) {
    const float* row = floats(op.x, op.C, scratch.x, r);
    const float* grad_normed = back.grad_normed ? floats(back.grad_normed, op.C, scratch.update, r) : nullptr;
    const float* grad_total = back.grad_total ? floats(back.grad_total, op.C, scratch.total, r) : nullptr;
    write_both(
        back.x, back.update, op.C, scratch.out,
        [&](float* to) { norm_row_backward(norm, row, grad_normed, grad_total, nullptr, to, weight_sum, bias_sum); }, r);
  });
}
