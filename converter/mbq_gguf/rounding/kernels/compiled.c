// Chains of small operations of rounding, TILE rows at a time: compiled.py compiles and calls them.
//
// Each takes the rows from `first` to `last`. They are PyTorch's operations in rounding/*.py one by one, but that sums over columns take one column after the other, whatever the
// processor. Rows are independent and lie side by side, so the loops over them become vector instructions. To be compiled without
// contracting products and sums, but where multiply_add() does.

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 64, LARGEST_GROUP = 256, LARGEST_SYSTEM = 128 };

// Which values a scale or an offset can take: Parameter of formats/grid.py.
enum { FP16, ZERO, UNSTEPPED, STEPPED };
struct parameter {
    int32_t kind;
    float   low, high;
};

struct grid {
    int32_t          word;   // scale and offset are one word (MBQ3S)
    int32_t          plain;  // the type has a plain rule, which is tried first
    float            low, high;
    struct parameter scale, offset;
};

static inline float multiply_add(float a, float b, float c) {
#ifdef FP_FAST_FMAF
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline float clamped(float x, float low, float high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

// The nearest whole number, ties to even, of what is below 2^22.
static inline float whole(float x) {
    return (x + 12582912.0f) - 12582912.0f;
}

static inline float reciprocal(float x) {
    return x == 0.0f ? 0.0f : 1.0f / x;
}

// x without its `dropped` lowest bits, rounded to nearest, ties to even.
static inline float shortened(float x, int dropped) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits += (1u << (dropped - 1)) - 1 + (bits >> dropped & 1);
    bits = bits >> dropped << dropped;
    memcpy(&x, &bits, sizeof(bits));
    return x;
}

// As fp16 stores it; beyond its range its largest number.
static inline float to_f16(float x) {
    x                 = clamped(x, -65504.0f, 65504.0f);
    const float small = copysignf(whole(x * 0x1p24f) * 0x1p-24f, x);
    return fabsf(x) < 0x1p-14f ? small : shortened(x, 13);
}

// The upper ten bits of the scale's fp16: mbq3s.nearest_parameters.
static inline float word_scale(float x) {
    x                 = to_f16(clamped(x, 0.0f, 65504.0f));
    const float small = whole(x * 0x1p19f) * 0x1p-19f, other = shortened(x, 18);
    return x < 0x1p-14f ? small : other < 64512.0f ? other : 64512.0f;
}

// A whole number of eighths of the scale, from -63 to 0.
static inline float word_offset(float scale, float offset) {
    const float zero = whole(clamped(offset * -8.0f * reciprocal(scale), 0.0f, 63.0f));
    return -(scale * zero) / 8.0f;
}

static inline float nearest(struct parameter is, float x, float step) {
    switch (is.kind) {
        case FP16: return to_f16(x);
        case ZERO: return 0.0f;
        case UNSTEPPED: return clamped(x, is.low < 0 ? -INFINITY : 0.0f, is.high > 0 ? INFINITY : 0.0f);
        default: return whole(clamped(step == 0.0f ? 0.0f : x / step, is.low, is.high)) * step;
    }
}

// Some rows of groups, a column's weights side by side, and what is found of them.
struct tile {
    int64_t size;
    float   weights[LARGEST_GROUP * TILE], costs[LARGEST_GROUP * TILE];
    float   scale_step[TILE], offset_step[TILE];
    float   tried_scale[TILE], tried_offset[TILE];
    float   scale[TILE], offset[TILE], least[TILE];
};

// The nearest pair that can be stored, in the place of the tried one: Grid.held.
static void hold(const struct grid * grid, struct tile * t) {
    if (grid->word) {
        for (int r = 0; r < TILE; r++) {
            t->tried_scale[r]  = word_scale(t->tried_scale[r]);
            t->tried_offset[r] = word_offset(t->tried_scale[r], t->tried_offset[r]);
        }
        return;
    }
    const struct parameter scale = grid->scale, offset = grid->offset;
    for (int r = 0; r < TILE; r++) {
        t->tried_scale[r] = nearest(scale, t->tried_scale[r], t->scale_step[r]);
    }
    for (int r = 0; r < TILE; r++) {
        t->tried_offset[r] = nearest(offset, t->tried_offset[r], t->offset_step[r]);
    }
}

// Takes the tried pair where it is better than the best so far, or the first: ranges._better.
static void compare(const struct grid * grid, struct tile * t) {
    const float low = grid->low, high = grid->high;
    float       error[TILE] = { 0 }, inverse[TILE];
    for (int r = 0; r < TILE; r++) {
        inverse[r] = reciprocal(t->tried_scale[r]);
    }
    for (int64_t c = 0; c < t->size; c++) {
        const float * weights = t->weights + c * TILE, *costs = t->costs + c * TILE;
        for (int r = 0; r < TILE; r++) {
            const float code = whole(clamped((weights[r] - t->tried_offset[r]) * inverse[r], low, high));
            const float off  = code * t->tried_scale[r] + t->tried_offset[r] - weights[r];
            error[r] += off * off * costs[r];
        }
    }
    for (int r = 0; r < TILE; r++) {
        const int can  = (low < 0) | (t->tried_scale[r] > 0) | (t->least[r] == INFINITY);
        const int take = (error[r] < t->least[r]) & can;
        t->scale[r]    = take ? t->tried_scale[r] : t->scale[r];
        t->offset[r]   = take ? t->tried_offset[r] : t->offset[r];
        t->least[r]    = take ? error[r] : t->least[r];
    }
}

// The plain range first, then shrunken ones: ranges._ranges.
static void try_ranges(const struct grid * grid, struct tile * t, const float * shares, int64_t count) {
    float low[TILE], high[TILE];
    memcpy(low, t->weights, sizeof(low));
    memcpy(high, t->weights, sizeof(high));
    for (int64_t c = 1; c < t->size; c++) {
        for (int r = 0; r < TILE; r++) {
            const float weight = t->weights[c * TILE + r];
            low[r]             = weight < low[r] ? weight : low[r];
            high[r]            = weight > high[r] ? weight : high[r];
        }
    }
    if (grid->plain) {
        for (int r = 0; r < TILE; r++) {
            const float first = grid->word && low[r] > 0 ? 0.0f : low[r], last = grid->word && high[r] < 0 ? 0.0f : high[r];
            const float largest = fabsf(low[r]) > fabsf(high[r]) ? fabsf(low[r]) : fabsf(high[r]);
            t->tried_scale[r]   = grid->low < 0 ? largest / grid->high : last / grid->high - first / grid->high;
            t->tried_offset[r]  = first + 0.0f;
        }
        hold(grid, t);
        compare(grid, t);
    }
    if (grid->low < 0) {  // no offset: the extreme weight gets the lowest code, or the one opposite
        for (int64_t turn = 0; turn < 2 * count; turn++) {
            const float share = turn % 2 ? -shares[turn / 2] : shares[turn / 2];
            for (int r = 0; r < TILE; r++) {
                t->tried_scale[r]  = (fabsf(low[r]) > fabsf(high[r]) ? low[r] : high[r]) / grid->low * share;
                t->tried_offset[r] = 0.0f;
            }
            hold(grid, t);
            compare(grid, t);
        }
        return;
    }
    for (int64_t turn = 0; turn < count * count; turn++) {
        const float from_low = shares[turn / count], from_high = shares[turn % count];
        for (int r = 0; r < TILE; r++) {
            t->tried_scale[r]  = (high[r] - low[r]) / grid->high;
            t->tried_offset[r] = low[r] * from_low;
        }
        hold(grid, t);
        for (int r = 0; r < TILE; r++) {
            t->tried_scale[r] = (high[r] * from_high - t->tried_offset[r]) / grid->high;
        }
        hold(grid, t);
        compare(grid, t);
    }
}

// The line of least weighted squares through the best pair's codes, its offset rounded first: ranges._line.
static void try_line(const struct grid * grid, struct tile * t) {
    float codes[LARGEST_GROUP * TILE], inverse[TILE], total[TILE] = { 0 };
    float mean_code[TILE] = { 0 }, mean[TILE] = { 0 }, above[TILE] = { 0 }, below[TILE] = { 0 };
    for (int r = 0; r < TILE; r++) {
        inverse[r] = reciprocal(t->scale[r]);
    }
    for (int64_t at = 0; at < t->size * TILE; at += TILE) {
        for (int r = 0; r < TILE; r++) {
            total[r] += t->costs[at + r];
        }
    }
    for (int64_t at = 0; at < t->size * TILE; at += TILE) {
        for (int r = 0; r < TILE; r++) {
            const float share = t->costs[at + r] / total[r];
            codes[at + r]     = whole(clamped((t->weights[at + r] - t->offset[r]) * inverse[r], grid->low, grid->high));
            mean_code[r] += codes[at + r] * share;
            mean[r] += t->weights[at + r] * share;
        }
    }
    for (int64_t at = 0; at < t->size * TILE; at += TILE) {
        for (int r = 0; r < TILE; r++) {
            const float centred = (codes[at + r] - mean_code[r]) * (t->costs[at + r] / total[r]);
            above[r] += centred * t->weights[at + r];
            below[r] += centred * codes[at + r];
        }
    }
    for (int r = 0; r < TILE; r++) {
        t->tried_scale[r]  = above[r] / (below[r] > 1e-12f ? below[r] : 1e-12f);
        t->tried_offset[r] = mean[r] - t->tried_scale[r] * mean_code[r];
        above[r] = below[r] = 0.0f;
    }
    hold(grid, t);
    for (int64_t at = 0; at < t->size * TILE; at += TILE) {
        for (int r = 0; r < TILE; r++) {
            const float weighted = codes[at + r] * (t->costs[at + r] / total[r]);
            above[r] += weighted * (t->weights[at + r] - t->tried_offset[r]);
            below[r] += weighted * codes[at + r];
        }
    }
    for (int r = 0; r < TILE; r++) {
        t->tried_scale[r] = above[r] / (below[r] > 1e-12f ? below[r] : 1e-12f);
    }
    hold(grid, t);
}

// Scale and offset of groups of `size` weights, which lie `of_row` and `of_column` apart; costs are
// [kinds, size], the first kind for the first group, and so on in turn; steps [rows, 2] or NULL. See ranges.search_range.
void search(const struct grid * grid, const float * groups, const float * costs, const float * steps, const float * shares,
            int64_t share_count, int64_t turns, float * scale, float * offset, int64_t kinds, int64_t size, int64_t of_row,
            int64_t of_column, int64_t first, int64_t last) {
    struct tile t = { .size = size };
    for (int64_t start = first; start < last; start += TILE) {
        const int64_t count = last - start < TILE ? last - start : TILE;
        for (int64_t c = 0; c < size; c++) {
            for (int64_t r = 0; r < count; r++) {
                t.weights[c * TILE + r] = groups[(start + r) * of_row + c * of_column];
                t.costs[c * TILE + r]   = costs[(kinds == 1 ? 0 : (start + r) % kinds) * size + c];
            }
        }
        for (int64_t r = 0; r < count; r++) {
            t.least[r]       = INFINITY;
            t.scale_step[r]  = steps ? steps[2 * (start + r)] : 0.0f;
            t.offset_step[r] = steps ? steps[2 * (start + r) + 1] : 0.0f;
        }
        try_ranges(grid, &t, shares, share_count);
        for (int64_t turn = 0; turn < turns; turn++) {
            try_line(grid, &t);
            compare(grid, &t);
        }
        memcpy(scale + start, t.scale, count * sizeof(float));
        memcpy(offset + start, t.offset, count * sizeof(float));
    }
}

// Take factor[k] times the change of some rows off each later column.
static void carry(float * later, const float * factor, int64_t of_factor, const float * change, int64_t columns, int64_t rows, int64_t count) {
    for (int64_t k = 0; k < columns; k++) {
        const float by = factor[k * of_factor];
        for (int64_t r = 0; r < count; r++) {
            later[k * rows + r] = multiply_add(-change[r], by, later[k * rows + r]);
        }
    }
}

// GPTQ's loop over `count` columns of work [columns, rows] from `start` on: gptq._round_group. factor has `stride` numbers a row, line is
// [2, rows].
void round_group(float * work, const float * factor, const float * line, float * codes, float * errors, int64_t rows, int64_t columns,
                 int64_t start, int64_t count, int64_t stride, float low, float high, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += TILE) {
        const int64_t n     = last - row < TILE ? last - row : TILE;
        const float * scale = line + row, *offset = line + rows + row;
        for (int64_t j = start; j < start + count; j++) {
            const float   own    = factor[j * stride + j];
            const float * weight = work + j * rows + row;
            float *       code = codes + j * rows + row, *error = errors + j * rows + row;
            for (int64_t r = 0; r < n; r++) {
                code[r]  = whole(clamped((weight[r] - offset[r]) * reciprocal(scale[r]), low, high));
                error[r] = (weight[r] - (code[r] * scale[r] + offset[r])) / own;
            }
            carry(work + (j + 1) * rows + row, factor + j * stride + j + 1, 1, error, columns - j - 1, rows, n);
        }
    }
}

// One pass of coordinate descent: descent._descend_columns. All are [columns, rows], matrix has `stride` numbers a row; codes get better in
// place, slope is changed.
void descend_columns(float * slope, const float * matrix, const float * scales, float * codes, float * changes, int64_t rows,
                     int64_t columns, int64_t stride, float low, float high, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += TILE) {
        const int64_t n = last - row < TILE ? last - row : TILE;
        for (int64_t j = 0; j < columns; j++) {
            const float   own  = matrix[j * stride + j];
            const float * pull = slope + j * rows + row, *scale = scales + j * rows + row;
            float *       code = codes + j * rows + row, *change = changes + j * rows + row;
            for (int64_t r = 0; r < n; r++) {
                const float better = whole(clamped(pull[r] * reciprocal(scale[r]) / own + code[r], low, high));
                change[r]          = (better - code[r]) * scale[r];
                code[r]            = better;
            }
            carry(slope + (j + 1) * rows + row, matrix + (j + 1) * stride + j, stride, change, columns - j - 1, rows, n);
        }
    }
}

// The rows of a group's scale and offset in the lower triangles of systems [rows, 2 groups, 2 groups]: refit._fill. codes are
// [columns, rows], by_scale [columns from the group on, rows] those of the group times its rows of H, sums [columns] the sums of these rows,
// squares [groups] those over a group's columns.
void fill(double * systems, const float * codes, const float * by_scale, const float * sums, const double * squares, int64_t rows,
          int64_t columns, int64_t groups, int64_t group, int64_t first, int64_t last) {
    const int64_t size = columns / groups, numbers = 2 * groups, own = 2 * (groups - group) - 1;
    for (int64_t row = first; row < last; row += TILE) {
        const int64_t n = last - row < TILE ? last - row : TILE;
        for (int64_t h = group; h < groups; h++) {
            float both[TILE] = { 0 }, scale_offset[TILE] = { 0 }, offset_scale[TILE] = { 0 };
            for (int64_t c = h * size; c < (h + 1) * size; c++) {
                const float * code = codes + c * rows + row, *by = by_scale + (c - group * size) * rows + row;
                for (int64_t r = 0; r < n; r++) {
                    both[r] = multiply_add(by[r], code[r], both[r]);
                    scale_offset[r] += by[r];
                    offset_scale[r] = multiply_add(sums[c], code[r], offset_scale[r]);
                }
            }
            for (int64_t r = 0; r < n; r++) {
                double * of_scale = systems + ((row + r) * numbers + own) * numbers + 2 * (groups - h) - 1, *of_offset = of_scale - numbers;
                of_scale[0]       = both[r];
                of_scale[-1]      = scale_offset[r];
                of_offset[0]      = offset_scale[r];
                of_offset[-1]     = squares[h];
            }
        }
    }
}

// Systems [rows, numbers, numbers], of which the lower triangles are given, to their Cholesky factors L in the same place, and right
// [rows, numbers] to the solution y of L y = right. positive [rows] tells where there is a factor.
void factor(double * systems, double * right, uint8_t * positive, int64_t numbers, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        double * l = systems + row * numbers * numbers, *y = right + row * numbers;
        positive[row] = 1;
        for (int64_t j = 0; j < numbers; j++) {
            positive[row] &= l[j * (numbers + 1)] > 0;
            const double own = sqrt(fabs(l[j * (numbers + 1)])), inverse = 1.0 / own;
            double       column[LARGEST_SYSTEM];
            l[j * (numbers + 1)] = own;
            y[j] *= inverse;
            for (int64_t i = j + 1; i < numbers; i++) {
                column[i] = l[i * numbers + j] *= inverse;
                y[i] -= column[i] * y[j];
                for (int64_t k = j + 1; k <= i; k++) {
                    l[i * numbers + k] -= column[i] * column[k];
                }
            }
        }
    }
}

// Scales and offsets [rows, groups] rounded in turn: refit._take_steps. halfway is [rows, 2 groups] and is changed; the numbers of lower
// [rows, 2 groups, 2 groups] lie so far apart.
void take_steps(double * halfway, const double * lower, const float * scale, const float * offset, float * new_scale, float * new_offset,
                int64_t groups, int64_t of_row, int64_t of_number, int64_t of_left, int32_t word, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        double *       left = halfway + row * 2 * groups;
        const double * l    = lower + row * of_row;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = row * groups + g, index = 2 * (groups - g) - 1;
            const float   moved = (float) (scale[at] + left[index] / l[index * (of_number + of_left)]);
            new_scale[at]       = word ? word_scale(moved) : to_f16(moved);
            const double change = new_scale[at] - scale[at];
            for (int64_t i = 0; i <= index; i++) {
                left[i] -= change * l[index * of_number + i * of_left];
            }
            const int64_t before = index - 1;
            const float   beside = (float) (offset[at] + left[before] / l[before * (of_number + of_left)]);
            new_offset[at]       = word ? word_offset(new_scale[at], beside) : to_f16(beside);
            const double turned  = new_offset[at] - offset[at];
            for (int64_t i = 0; i <= before; i++) {
                left[i] -= turned * l[before * of_number + i * of_left];
            }
        }
    }
}
