"""The builder's compiled functions: deterministic exp and log, the prior, the renderer.

One file, and math, numba and numpy only, because Numba's on-disk cache does not notice an edit in
another file. No state between calls, no fastmath, and no libm call but sqrt and floor, which are
exact by definition: the same bits on every CPU.
"""

import math

import numpy as np
from numba import njit, prange

# The image is painted in tiles whose sums stay near the core: 28 KiB. 112 columns are half of 224,
# a multiple of the widest register's 16, and no power of two: then all rows of a tile would share
# few lines of the L1 cache.
_COLUMNS = 112
_HALF = 8  # rows that the recurrence goes up and down from a tile's middle, to bound its error
_ROWS = 2 * _HALF
_PLANES = 4  # sums of a pixel: density, and density times each of three colours
_ROW = _PLANES * _COLUMNS  # float32 values of one row of a tile
_CHUNK = 16  # columns that a sharp component paints at once

# Below this standard deviation, in pixels along the row or the column, a component is "sharp".
# Smooth ones start the recurrence at a tile's middle row, 8 rows or 3.2 standard deviations from
# its edge: what is visible at the edge is above e^-45 there, so above _LOG_FLUSH, and what is
# above _LOG_FLUSH there stays a normal float32 to the edge. Denormal numbers are slow.
_SHARP_PX = 2.5
_LOG_FLUSH = np.float32(-46.0)

# A component's constants: centre of row y is MU_X + SLOPE (y - MU_Y), and
# Q = ((x - centre) / WIDTH)^2 + ((y - MU_Y) / SIGMA_Y)^2; HEIGHT is to a column what WIDTH is to a
# row; LOG_WEIGHT is the log density at the mean relative to _LOG_CUT's bound.
_MU_X, _MU_Y, _RHO, _SLOPE, _WIDTH, _HEIGHT, _SIGMA_Y, _LOG_WEIGHT = range(8)

# A component is cut where it lies below this share of (a lower bound of) the image's largest
# density, less for more than 30: all together then stay below a thousandth of a grey level.
_LOG_CUT = -15.942385152878742  # log(2^-23)

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693147180369123816490  # ln 2 in two parts: n * high is exact for |n| < 2^20
_LN2_LOW = 1.90821492927058770002e-10

# Coefficients of Wichura 1988, AS 241 (PPND16), constant term first.
_CENTRE_TOP = (
    3.3871328727963666080, 1.3314166789178437745e2, 1.9715909503065514427e3,
    1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
    3.3430575583588128105e4, 2.5090809287301226727e3)  # fmt: skip
_CENTRE_BOTTOM = (
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
    5.2264952788528545610e3)  # fmt: skip
_MIDDLE_TOP = (
    1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550,
    3.64784832476320460504, 1.27045825245236838258, 2.41780725177450611770e-1,
    2.27238449892691845833e-2, 7.74545014278341407640e-4)  # fmt: skip
_MIDDLE_BOTTOM = (
    1.0, 2.05319162663775882187, 1.67638483018380384940, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
    1.05075007164441684324e-9)  # fmt: skip
_TAIL_TOP = (
    6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580,
    2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
    2.71155556874348757815e-5, 2.01033439929228813265e-7)  # fmt: skip
_TAIL_BOTTOM = (
    1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
    7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
    2.04426310338993978564e-15)  # fmt: skip


@njit(cache=True, error_model="numpy")
def exp(x):
    """e^x in float64, relative error below 1e-15; 0 below -708, inf above 709."""
    y = min(max(x, -708.0), 709.0)
    n = np.floor(y * _LOG2_E + 0.5)
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    e = 1.0  # Taylor to r^13 / 13! by Horner's rule, |r| <= ln 2 / 2
    for k in range(13, 0, -1):
        e = 1.0 + e * r / k
    # The low bits of n + 1.5 * 2^52 are n; adding them to the exponent of e multiplies it by 2^n.
    exponent = np.float64(n + 6755399441055744.0).view(np.int64) << np.int64(52)
    value = np.int64(np.float64(e).view(np.int64) + exponent).view(np.float64)
    return math.inf if x > 709.0 else (0.0 if x < -708.0 else value)


@njit(cache=True, error_model="numpy")
def log(x):
    """Natural logarithm of a positive normal float64, error below 1e-15 times max(1, |log x|)."""
    bits = np.float64(x).view(np.int64)
    n = (bits >> np.int64(52)) - 1022  # x = m 2^n, m in [0.5, 1)
    m = np.int64(bits & np.int64(0xFFFFFFFFFFFFF) | np.int64(1022 << 52)).view(np.float64)
    small = m < 0.7071067811865476
    m, n = (2.0 * m, n - 1) if small else (m, n)
    f = (m - 1.0) / (m + 1.0)  # log m = 2 atanh f = 2 (f + f^3/3 + ...), |f| <= 0.1716
    f2 = f * f
    tail = 0.0
    for k in range(23, 1, -2):
        tail = f2 * (1.0 / k + tail)
    return n * _LN2_HIGH + (n * _LN2_LOW + 2.0 * (f + f * tail))


@njit(cache=True)
def _polynomial(coefficients, x):
    value = 0.0
    for k in range(len(coefficients) - 1, -1, -1):
        value = value * x + coefficients[k]
    return value


@njit(cache=True)
def normal_quantile(u):
    """The value that a standard normal stays below with probability u in (0, 1) (AS 241)."""
    q = u - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return q * _polynomial(_CENTRE_TOP, r) / _polynomial(_CENTRE_BOTTOM, r)
    r = math.sqrt(-log(min(u, 1.0 - u)))
    if r <= 5.0:
        size = _polynomial(_MIDDLE_TOP, r - 1.6) / _polynomial(_MIDDLE_BOTTOM, r - 1.6)
    else:
        size = _polynomial(_TAIL_TOP, r - 5.0) / _polynomial(_TAIL_BOTTOM, r - 5.0)
    return size if q > 0.0 else -size


@njit(cache=True)
def _unit(bits):
    """Uniform in [0, 1) from the upper 53 of 64 random bits."""
    return float(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True)
def _normal(bits):
    """Standard normal from the upper 52 of 64 random bits; the half keeps u inside (0, 1)."""
    return normal_quantile((float(bits >> np.uint64(12)) + 0.5) * (1.0 / 4503599627370496.0))


@njit(cache=True, error_model="numpy")
def _exp_all(x):
    """exp in place: a loop of nothing else, so that it becomes vector instructions."""
    for i in range(x.shape[0]):
        x[i] = exp(x[i])


@njit(cache=True)
def draw_theta(bits, channels, ranges, log_uniform, peak, theta):
    """Turn random bits into parameter vectors, in the order of equations 1 and 2.

    bits: uint64 [N, at least 1 + K(C+6)], one word a parameter, the scale's first.
    ranges: float64 [9] = color low, high, mean low, high, sigma first, second, max |rho|,
    scale low, high; sigma's two are low, high when `log_uniform`, else offset and nothing.
    peak: whether the softmax is of the components' heights; pi is then height times width, summing
    to 1.
    theta: float32 [N, K(C+6)+1], written.
    """
    fields = channels + 6
    components = (theta.shape[1] - 1) // fields
    share = np.empty(components, np.float64)
    sigma = np.empty(2 * components, np.float64)
    low = log(ranges[4]) if log_uniform else 0.0
    width = log(ranges[5]) - low if log_uniform else 0.0
    for i in range(theta.shape[0]):
        words, scale = bits[i], ranges[7] + _unit(bits[i, 0]) * (ranges[8] - ranges[7])
        theta[i, components * fields] = scale
        for k in range(components):
            word = 1 + k * fields + channels
            share[k] = _normal(words[word + 5])
            for c in range(2):
                own = words[word + 2 + c]
                sigma[2 * k + c] = low + _unit(own) * width if log_uniform else _normal(own)
        _exp_all(share)
        _exp_all(sigma)
        total = 0.0
        for k in range(components):
            for c in range(2):
                e = sigma[2 * k + c]
                sigma[2 * k + c] = e if log_uniform else log(1.0 + e) + ranges[4]
            if peak:
                rho = ranges[6] * (2.0 * _unit(words[1 + k * fields + channels + 4]) - 1.0)
                root = math.sqrt((1.0 - rho) * (1.0 + rho))
                share[k] *= sigma[2 * k] * sigma[2 * k + 1] * root
            total += share[k]
        for k in range(components):
            word, value = 1 + k * fields, k * fields
            for c in range(channels):
                u = _unit(words[word + c])
                theta[i, value + c] = ranges[0] + u * (ranges[1] - ranges[0])
            word += channels
            value += channels
            for c in range(2):
                u = _unit(words[word + c])
                theta[i, value + c] = ranges[2] + u * (ranges[3] - ranges[2])
                theta[i, value + 2 + c] = sigma[2 * k + c]
            theta[i, value + 4] = ranges[6] * (2.0 * _unit(words[word + 4]) - 1.0)
            theta[i, value + 5] = share[k] / total  # mass: the softmax of K normals


@njit(cache=True, error_model="numpy")
def _exp_float32(x):
    """e^x in float32 for |x| < 87, relative error below 1.2e-7; no branch, so it vectorises."""
    shifted = x * np.float32(1.442695) + np.float32(12582912.0)  # 1.5 * 2^23: rounds to an integer
    n = shifted - np.float32(12582912.0)
    # ln 2 in two parts, the first with so few bits that n times it is exact.
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    # Minimax for the relative error on |r| <= ln 2 / 2: 3e-9, far below the rounding.
    e = np.float32(1.3814581e-3)
    e = e * r + np.float32(8.3687255e-3)
    e = e * r + np.float32(4.1668389e-2)
    e = e * r + np.float32(1.6666521e-1)
    e = e * r + np.float32(0.49999993)
    e = e * r + np.float32(1.0)
    e = e * r + np.float32(1.0)
    # The low bits of `shifted` are n; adding them to the exponent of e multiplies it by 2^n.
    exponent = np.int32(np.float32(shifted).view(np.int32) << np.int32(23))
    return np.int32(np.float32(e).view(np.int32) + exponent).view(np.float32)


@njit(cache=True)
def _least_distance(part, height, width):
    """The least Q of a component over the pixels near its mean; over all rows for a thin one."""
    step_x, step_y = 2.0 / (width - 1), 2.0 / (height - 1)
    first = last = math.floor((part[_MU_Y] + 1.0) / step_y + 0.5)
    if part[_WIDTH] < step_x or part[_HEIGHT] < step_y:
        first, last = 0, height - 1
    least = math.inf
    for i in range(first, last + 1):
        dy = i * step_y - 1.0 - part[_MU_Y]
        centre = part[_MU_X] + part[_SLOPE] * dy  # where Q is least on this row
        column = math.floor(min(max((centre + 1.0) / step_x, 0.0), width - 1.0) + 0.5)
        z_x, z_y = (column * step_x - 1.0 - centre) / part[_WIDTH], dy / part[_SIGMA_Y]
        least = min(least, z_x * z_x + z_y * z_y)
    return least


@njit(cache=True)
def _prepare(theta, channels, height, width, parts, sharp, weights):
    """Write the constants of the components that weigh anything; return their number.

    parts: float64 [K, 8], see _MU_X; sharp: bool [K], see _SHARP_PX; weights: float32
    [K, 4 (_HALF + 1)], by plane, how the recurrence's g counts j rows from where it started.
    """
    fields = channels + 6
    step_x, step_y = 2.0 / (width - 1), 2.0 / (height - 1)
    components = (theta.shape[0] - 1) // fields
    bound = -math.inf
    count = 0
    for k in range(components):
        color, t = k * fields, k * fields + channels
        sigma_x, sigma_y = float(theta[t + 2]), float(theta[t + 3])
        rho, share = float(theta[t + 4]), float(theta[t + 5])
        if share <= 0.0:
            continue
        rest = (1.0 - rho) * (1.0 + rho)
        part = parts[count]
        part[_MU_X], part[_MU_Y] = float(theta[t]), float(theta[t + 1])
        part[_RHO], part[_SLOPE] = rho, rho * sigma_x / sigma_y
        part[_WIDTH], part[_HEIGHT] = sigma_x * math.sqrt(rest), sigma_y * math.sqrt(rest)
        part[_SIGMA_Y] = sigma_y
        part[_LOG_WEIGHT] = log(share) - log(sigma_x) - log(sigma_y) - 0.5 * log(rest)
        # The largest density of one component on the grid bounds the image's from below.
        bound = max(bound, part[_LOG_WEIGHT] - 0.5 * _least_distance(part, height, width))
        sharp[count] = min(part[_WIDTH] / step_x, part[_HEIGHT] / step_y) < _SHARP_PX
        # Log g is a parabola along a column: g ratio^j lacks its second difference, exp(-j^2 c).
        rows = step_y / part[_HEIGHT]
        ratio = 1.0 if sharp[count] else exp(-0.5 * rows * rows)
        decay, factor = 1.0, ratio
        for j in range(_HALF + 1):
            weights[count, _PLANES * j] = decay
            for c in range(_PLANES - 1):
                v = 127.5 * (float(theta[color + min(c, channels - 1)]) + 1.0)
                weights[count, _PLANES * j + 1 + c] = decay * v
            decay *= factor
            factor *= ratio * ratio
        count += 1
    more = log(max(1.0, components / 30.0))  # each of many must be cut later
    for n in range(count):
        parts[n, _LOG_WEIGHT] += more - bound
    return count


@njit(cache=True)
def _extent(part, top, bottom):
    """The least and largest x that a component is visible at between y = top and y = bottom."""
    visible = 2.0 * (part[_LOG_WEIGHT] - _LOG_CUT)
    if visible <= 0.0:
        return 1.0, 0.0
    reach = part[_SIGMA_Y] * math.sqrt(visible)
    low, high = max(top - part[_MU_Y], -reach), min(bottom - part[_MU_Y], reach)
    if low > high:
        return 1.0, 0.0
    # The ellipse is widest at dy = -rho reach to the left and rho reach to the right.
    left = min(max(-part[_RHO] * reach, low), high)
    right = min(max(part[_RHO] * reach, low), high)
    z_left, z_right = left / part[_SIGMA_Y], right / part[_SIGMA_Y]
    left_half = part[_WIDTH] * math.sqrt(max(0.0, visible - z_left * z_left))
    right_half = part[_WIDTH] * math.sqrt(max(0.0, visible - z_right * z_right))
    middle, slope = part[_MU_X], part[_SLOPE]
    return middle + slope * left - left_half, middle + slope * right + right_half


@njit(cache=True, error_model="numpy")
def _start(part, x, y, step_x, step_y, g, ratio, g_up, ratio_up):
    """Write g, a smooth component's density on a tile's row at y, and its ratio to the next row's.

    x: of the tile's first column. g_up and ratio_up: the same for the row above, going upwards.
    """
    dy = y - part[_MU_Y]
    z_y = dy / part[_SIGMA_Y]
    centre = part[_MU_X] + part[_SLOPE] * dy
    narrow = 1.0 / (part[_WIDTH] * part[_WIDTH])
    first, step = np.float32(x - centre), np.float32(step_x)
    peak, curve = np.float32(part[_LOG_WEIGHT] - 0.5 * z_y * z_y), np.float32(-0.5 * narrow)
    fall = np.float32(-z_y / part[_SIGMA_Y] * step_y)
    tilt = np.float32(narrow * part[_SLOPE] * step_y)
    for i in range(_COLUMNS):
        dx = first + np.float32(np.int32(i)) * step
        log_g = peak + curve * dx * dx
        value = _exp_float32(max(log_g, _LOG_FLUSH))
        value = value if log_g > _LOG_FLUSH else np.float32(0.0)
        # Where this clips, the component is invisible in all of the tile's rows.
        forth = _exp_float32(min(max(fall + tilt * dx, np.float32(-40.0)), np.float32(40.0)))
        back = np.float32(1.0) / forth
        g[i], ratio[i] = value, forth
        g_up[i], ratio_up[i] = value * back, back


@njit(cache=True)
def _weights(weights, n, j):
    i = _PLANES * j
    return weights[n, i], weights[n, i + 1], weights[n, i + 2], weights[n, i + 3]


@njit(cache=True, error_model="numpy")
def _add_two_rows(g, r, weights, chosen, j, near, far):
    """Add four components to the two rows j and j + 1 from their start: fewer loads and stores."""
    a0, a1 = _weights(weights, chosen[0], j), _weights(weights, chosen[1], j)
    a2, a3 = _weights(weights, chosen[2], j), _weights(weights, chosen[3], j)
    b0, b1 = _weights(weights, chosen[0], j + 1), _weights(weights, chosen[1], j + 1)
    b2, b3 = _weights(weights, chosen[2], j + 1), _weights(weights, chosen[3], j + 1)
    for i in range(_COLUMNS):
        g0, g1, g2, g3 = g[i], g[_COLUMNS + i], g[2 * _COLUMNS + i], g[3 * _COLUMNS + i]
        r0, r1, r2, r3 = r[i], r[_COLUMNS + i], r[2 * _COLUMNS + i], r[3 * _COLUMNS + i]
        for p in range(_PLANES):
            near[p * _COLUMNS + i] += (g0 * a0[p] + g1 * a1[p]) + (g2 * a2[p] + g3 * a3[p])
        g0, g1, g2, g3 = g0 * r0, g1 * r1, g2 * r2, g3 * r3
        for p in range(_PLANES):
            far[p * _COLUMNS + i] += (g0 * b0[p] + g1 * b1[p]) + (g2 * b2[p] + g3 * b3[p])
        g[i], g[_COLUMNS + i] = g0 * r0, g1 * r1
        g[2 * _COLUMNS + i], g[3 * _COLUMNS + i] = g2 * r2, g3 * r3


@njit(cache=True)
def _add_smooth(state, weights, chosen, sums):
    """Add the four components in `state` to a tile, from its middle row down and up."""
    for j in range(0, _HALF, 2):
        row = _ROW * (_HALF + j)
        near, far = sums[row : row + _ROW], sums[row + _ROW : row + 2 * _ROW]
        _add_two_rows(state[0], state[1], weights, chosen, j, near, far)
    for j in range(1, _HALF + 1, 2):
        row = _ROW * (_HALF - j)
        near, far = sums[row : row + _ROW], sums[row - _ROW : row]
        _add_two_rows(state[2], state[3], weights, chosen, j, near, far)


@njit(cache=True, error_model="numpy")
def _add_chunk(dx, step, peak, curve, weights, sums):
    """Add a sharp component to 16 columns of a row; in float64, as peak may be large."""
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    for i in range(_CHUNK):
        x = dx + i * step
        log_g = np.float32(max(peak + curve * x * x, float(_LOG_FLUSH)))
        g = _exp_float32(log_g)
        g = g if log_g > _LOG_FLUSH else np.float32(0.0)
        sums[i] += g * w0
        sums[_COLUMNS + i] += g * w1
        sums[2 * _COLUMNS + i] += g * w2
        sums[3 * _COLUMNS + i] += g * w3


@njit(cache=True)
def _add_sharp(part, x, y, step_x, step_y, weights, sums):
    """Add a component too narrow for the recurrence to the tile at x, y, an exp for each pixel."""
    curve = -0.5 / (part[_WIDTH] * part[_WIDTH])
    chunk, chunks = _CHUNK * step_x, _COLUMNS / _CHUNK
    for row in range(_ROWS):
        dy = y + row * step_y - part[_MU_Y]
        z_y = dy / part[_SIGMA_Y]
        peak = part[_LOG_WEIGHT] - 0.5 * z_y * z_y
        if peak <= _LOG_CUT:
            continue
        centre = part[_MU_X] + part[_SLOPE] * dy
        reach = part[_WIDTH] * math.sqrt(2.0 * (peak - _LOG_CUT))
        first = math.floor(min(max((centre - reach - x) / chunk, 0.0), chunks))
        last = math.floor(min(max((centre + reach - x) / chunk, -1.0), chunks - 1.0))
        for n in range(first, last + 1):
            part_of_row = sums[row * _ROW + n * _CHUNK : (row + 1) * _ROW]
            _add_chunk(x + n * chunk - centre, step_x, peak, curve, weights, part_of_row)


@njit(cache=True)
def _paint_tile(parts, sharp, weights, visible, x, y, step_x, step_y, state, sums):
    """Write a tile's sums: the visible components, of which only the numbers in `visible`."""
    sums[:] = np.float32(0.0)
    smooth = np.zeros(visible.shape[0] + 3, np.int64)
    count = 0
    for n in visible:
        if sharp[n]:
            _add_sharp(parts[n], x, y, step_x, step_y, weights[n], sums)
        else:
            smooth[count] = n
            count += 1
    for first in range(0, count, 4):
        for k in range(4):
            own = slice(k * _COLUMNS, (k + 1) * _COLUMNS)
            g, ratio, g_up, ratio_up = state[0, own], state[1, own], state[2, own], state[3, own]
            if first + k < count:
                part = parts[smooth[first + k]]
                _start(part, x, y + _HALF * step_y, step_x, step_y, g, ratio, g_up, ratio_up)
            else:
                g[:], g_up[:] = np.float32(0.0), np.float32(0.0)
        _add_smooth(state, weights, smooth[first : first + 4], sums)


@njit(cache=True)
def _mix(normal, sums, scale, planes, out):
    """Equation 7 on a row of a tile: normal, out uint8 [n C]; sums float32 [4 * 112].

    planes: (1, 2, 3) or (1,), the channels' sums; a tuple, as the compiler knows its length.
    """
    low, high, half = np.float32(0.0), np.float32(255.0), np.float32(0.5)
    for i in range(out.shape[0] // len(planes)):
        share = sums[i]
        for c in range(len(planes)):
            g = np.float32(normal[len(planes) * i + c])
            value = g + scale * (sums[planes[c] * _COLUMNS + i] - share * g) + half
            out[len(planes) * i + c] = np.uint8(min(max(value, low), high))


@njit(cache=True)
def _render_image(normal, theta, out, tiles, state):
    """Equations 3 to 7 for one image: normal, out uint8 [H, W, C].

    tiles: float32 [ceil(H / 16), ceil(W / 112), 16 * 4 * 112], overwritten with the sums; state:
    float32 [4, 4 * 112], finite, overwritten.
    """
    height, width, channels = normal.shape
    step_x, step_y = 2.0 / (width - 1), 2.0 / (height - 1)
    components = (theta.shape[0] - 1) // (channels + 6)
    parts = np.empty((components, 8), np.float64)
    sharp = np.empty(components, np.bool_)
    weights = np.empty((components, _PLANES * (_HALF + 1)), np.float32)
    count = _prepare(theta, channels, height, width, parts, sharp, weights)
    extents = np.empty((components, 2), np.float64)
    visible = np.empty(components, np.int64)
    largest = np.zeros(_COLUMNS, np.float32)
    for down in range(tiles.shape[0]):
        y = down * _ROWS * step_y - 1.0
        for n in range(count):
            left, right = _extent(parts[n], y, y + (_ROWS - 1) * step_y)
            extents[n, 0], extents[n, 1] = left, right
        for across in range(tiles.shape[1]):
            x = across * _COLUMNS * step_x - 1.0
            found = 0
            for n in range(count):
                if extents[n, 0] <= x + (_COLUMNS - 1) * step_x and extents[n, 1] >= x:
                    visible[found] = n
                    found += 1
            sums = tiles[down, across]
            _paint_tile(parts, sharp, weights, visible[:found], x, y, step_x, step_y, state, sums)
            columns = min(_COLUMNS, width - across * _COLUMNS)
            for row in range(min(_ROWS, height - down * _ROWS)):
                density = sums[row * _ROW : row * _ROW + columns]
                for i in range(columns):
                    largest[i] = max(largest[i], density[i])
    peak = largest.max()
    scale = theta[theta.shape[0] - 1] / peak if peak > 0.0 else np.float32(0.0)
    for i in range(height):
        for across in range(tiles.shape[1]):
            sums = tiles[i // _ROWS, across, i % _ROWS * _ROW :]
            first = across * _COLUMNS * channels
            last = min(first + _COLUMNS * channels, width * channels)
            before, after = normal[i].reshape(-1)[first:last], out[i].reshape(-1)[first:last]
            if channels == 3:
                _mix(before, sums, scale, (1, 2, 3), after)
            else:
                _mix(before, sums, scale, (1,), after)


@njit(cache=True)
def render_every(normals, normal_index, theta, out, first, step):
    """As `render`, on this thread alone, for images `first`, `first` + `step`, ... of the batch."""
    down, right = -(-out.shape[1] // _ROWS), -(-out.shape[2] // _COLUMNS)
    size = down * right * _ROWS * _ROW
    memory = np.zeros(4 * _ROW + size + 16, np.float32)
    memory = memory[(-(memory.ctypes.data >> 2)) & 15 :]  # no vector straddles two cache lines
    state = memory[: 4 * _ROW].reshape(4, _ROW)
    tiles = memory[4 * _ROW : 4 * _ROW + size].reshape(down, right, _ROWS * _ROW)
    for i in range(first, theta.shape[0], step):
        _render_image(normals[normal_index[i]], theta[i], out[i], tiles, state)


@njit(cache=True, parallel=True)
def render(normals, normal_index, theta, out, threads=1):
    """Paint theta[i] on normals[normal_index[i]] into out[i], images in parallel.

    normals: uint8 [M, H, W, C], C 1 or 3; normal_index: int64 [N]; theta: float32
    [N, K(C+6)+1]; out: uint8 [N, H, W, C], written. All contiguous.
    """
    for thread in prange(threads):  # one share each, so that each allocates its tiles once
        render_every(normals, normal_index, theta, out, thread, threads)
