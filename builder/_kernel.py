"""Every compiled function of the builder: deterministic exp and log, the prior, the renderer.

One file, and math, numba and numpy only, because Numba's on-disk cache does not notice an edit in
another file. No randomness inside (random bits come in as an argument), no fastmath, and no libm
call but sqrt, floor, ceil, frexp and ldexp, which are exact by definition: the same bits on every
CPU.
"""

import math

import numpy as np
from numba import njit, prange

LANES = 16  # columns advanced together: one AVX-512 register of float32, or two of AVX2

_STRIP = 256  # columns after which a row's recurrence starts anew, to bound its rounding error

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
    3.3430575583588128105e4, 2.5090809287301226727e3,
)  # fmt: skip
_CENTRE_BOTTOM = (
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
    5.2264952788528545610e3,
)  # fmt: skip
_MIDDLE_TOP = (
    1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550,
    3.64784832476320460504, 1.27045825245236838258, 2.41780725177450611770e-1,
    2.27238449892691845833e-2, 7.74545014278341407640e-4,
)  # fmt: skip
_MIDDLE_BOTTOM = (
    1.0, 2.05319162663775882187, 1.67638483018380384940, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
    1.05075007164441684324e-9,
)  # fmt: skip
_TAIL_TOP = (
    6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580,
    2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
    2.71155556874348757815e-5, 2.01033439929228813265e-7,
)  # fmt: skip
_TAIL_BOTTOM = (
    1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
    7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
    2.04426310338993978564e-15,
)  # fmt: skip


@njit(cache=True)
def exp(x):
    """e^x in float64, relative error below 1e-15; 0 below -708, inf above 709."""
    if x > 709.0:
        return math.inf
    if x < -708.0:
        return 0.0
    n = math.floor(x * _LOG2_E + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    e = 1.0  # Taylor to r^13 / 13! by Horner's rule, |r| <= ln 2 / 2
    for k in range(13, 0, -1):
        e = 1.0 + e * r / k
    return math.ldexp(e, int(n))


@njit(cache=True)
def log(x):
    """Natural logarithm of a positive float64, error below 1e-15 times max(1, |log x|)."""
    m, n = math.frexp(x)
    if m < 0.7071067811865476:
        m *= 2.0
        n -= 1
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


@njit(cache=True)
def _sigma(bits, log_uniform, first, second):
    if log_uniform:
        low, high = log(first), log(second)
        return exp(low + _unit(bits) * (high - low))
    return log(1.0 + exp(_normal(bits))) + first  # softplus(n) + offset


@njit(cache=True)
def draw_theta(bits, channels, ranges, log_uniform, theta):
    """Turn random bits into parameter vectors, in the order of equations 1 and 2.

    bits: uint64 [N, 1 + K(C+6)], one word a parameter, the scale's first.
    ranges: float64 [9] = color low, high, mean low, high, sigma first, second, max |rho|,
    scale low, high; sigma's two are low, high when `log_uniform`, else offset and nothing.
    theta: float32 [N, K(C+6)+1], written.
    """
    width = channels + 6
    components = (theta.shape[1] - 1) // width
    share = np.empty(components, np.float64)
    for i in range(theta.shape[0]):
        total = 0.0
        for k in range(components):
            start = 1 + k * width
            share[k] = exp(_normal(bits[i, start + channels + 5]))
            total += share[k]
        for k in range(components):
            word, value = 1 + k * width, k * width
            for c in range(channels):
                u = _unit(bits[i, word + c])
                theta[i, value + c] = ranges[0] + u * (ranges[1] - ranges[0])
            word += channels
            value += channels
            for c in range(2):
                u = _unit(bits[i, word + c])
                theta[i, value + c] = ranges[2] + u * (ranges[3] - ranges[2])
                theta[i, value + 2 + c] = _sigma(
                    bits[i, word + 2 + c], log_uniform, ranges[4], ranges[5]
                )
            theta[i, value + 4] = ranges[6] * (2.0 * _unit(bits[i, word + 4]) - 1.0)
            theta[i, value + 5] = share[k] / total  # softmax of K normals
        u = _unit(bits[i, 0])
        theta[i, components * width] = ranges[7] + u * (ranges[8] - ranges[7])


@njit(cache=True)
def _exp_lanes(x, out, power, power_bits):
    """out[l] = e^x[l] in float32 for LANES values of |x| < 87, relative error 1e-7."""
    for lane in range(LANES):
        n = np.floor(x[lane] * np.float32(1.442695) + np.float32(0.5))
        # ln 2 in two parts, the first with so few bits that n times it is exact.
        r = (x[lane] - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
        e = np.float32(1.0 / 5040.0)
        e = e * r + np.float32(1.0 / 720.0)
        e = e * r + np.float32(1.0 / 120.0)
        e = e * r + np.float32(1.0 / 24.0)
        e = e * r + np.float32(1.0 / 6.0)
        e = e * r + np.float32(0.5)
        e = e * r + np.float32(1.0)
        e = e * r + np.float32(1.0)
        power_bits[lane] = (np.int32(n) + np.int32(127)) << np.int32(23)  # 2^n as float32 bits
        out[lane] = e
    for lane in range(LANES):
        out[lane] *= power[lane]


@njit(cache=True)
def _least_distance(row, height, width):
    """The least Q of a component over the pixels near its mean; over all rows for a thin one."""
    step = 2.0 / (width - 1)
    middle = math.floor((row[1] + 1.0) * 0.5 * (height - 1) + 0.5)
    first, last = middle, middle
    if row[2] * step * step > 1.0 or row[4] * step * step > 1.0:
        first, last = 0, height - 1
    least = math.inf
    for i in range(first, last + 1):
        dy = i * 2.0 / (height - 1) - 1.0 - row[1]
        best = row[0] + row[5] * dy  # where Q is least on this row
        column = math.floor((best + 1.0) * 0.5 * (width - 1) + 0.5)
        dx = min(max(column, 0), width - 1) * step - 1.0 - row[0]
        least = min(least, row[2] * dx * dx + 2.0 * row[3] * dx * dy + row[4] * dy * dy)
    return least


@njit(cache=True)
def _prepare(theta, channels, height, width, component):
    """Write each visible component's constants; return their number.

    component: float64 [K, 10] = mu_x, mu_y, a, b, c (Q = a dx^2 + 2 b dx dy + c dy^2), slope of the
    row-wise minimum, width of a row at Q = 1, log weight relative to the density bound, index,
    ratio of the ratios LANES columns apart.
    """
    fields = channels + 6
    components = (theta.shape[0] - 1) // fields
    bound = -math.inf
    count = 0
    for k in range(components):
        t = k * fields + channels
        mu_x, mu_y = float(theta[t]), float(theta[t + 1])
        sigma_x, sigma_y = float(theta[t + 2]), float(theta[t + 3])
        rho, share = float(theta[t + 4]), float(theta[t + 5])
        if share <= 0.0:
            continue
        rest = (1.0 - rho) * (1.0 + rho)
        log_weight = log(share) - log(sigma_x) - log(sigma_y) - 0.5 * log(rest)
        row = component[count]
        row[0], row[1] = mu_x, mu_y
        row[2] = 1.0 / (sigma_x * sigma_x * rest)
        row[3] = -rho / (sigma_x * sigma_y * rest)
        row[4] = 1.0 / (sigma_y * sigma_y * rest)
        row[5] = rho * sigma_x / sigma_y
        row[6] = sigma_x * math.sqrt(rest)
        row[7] = log_weight
        row[8] = k
        jump = LANES * 2.0 / (width - 1)
        row[9] = exp(-row[2] * jump * jump)
        # The largest density of one component on the grid bounds the image's from below.
        bound = max(bound, log_weight - 0.5 * _least_distance(row, height, width))
        count += 1
    more = log(max(1.0, components / 30.0))  # each of many must be cut later
    for j in range(count):
        component[j, 7] += more - bound
    return count


@njit(cache=True)
def _density_row(row, y, low, high, width, lanes, power, power_bits, density, ratio):
    """Write one component's density on columns low to high - 1 of one row.

    Returns the visible ones of these columns (first, past the last; 0, 0 for none).
    g(x) is Gaussian, so g(x + 16h)/g(x) is geometric in x: after 16 exps for g and 16 for the
    ratio, each further pixel costs two multiplications. float32 [columns - first] in `density`.
    """
    dy = y - row[1]
    visible = 2.0 * (row[7] - _LOG_CUT) - dy * dy * (row[4] - row[3] * row[3] / row[2])
    if visible <= 0.0:
        return 0, 0
    centre = row[0] + row[5] * dy
    reach = row[6] * math.sqrt(visible)
    half = 0.5 * (width - 1)
    first = max(low, math.ceil((centre - reach + 1.0) * half))
    last = min(high - 1, math.floor((centre + reach + 1.0) * half))
    if first > last:
        return 0, 0
    step = 2.0 / (width - 1)
    jump = LANES * step
    peak = row[7] - 0.5 * dy * dy * (row[4] - row[3] * row[3] / row[2])
    a = row[2]
    for lane in range(LANES):
        dx = (first + lane) * step - 1.0 - centre
        lanes[lane] = max(peak - 0.5 * a * dx * dx, -80.0)
    _exp_lanes(lanes, density, power, power_bits)
    count = last - first + 1
    if count > LANES:
        for lane in range(LANES):
            dx = (first + lane) * step - 1.0 - centre
            lanes[lane] = min(max(-a * jump * (dx + 0.5 * jump), -80.0), 80.0)
        _exp_lanes(lanes, ratio, power, power_bits)
        q = np.float32(row[9])
        for i in range(count - LANES):
            density[i + LANES] = density[i] * ratio[i]
            ratio[i + LANES] = ratio[i] * q
    return first, last + 1


@njit(cache=True)
def _render_image(normal, theta, out, planes):
    """Equations 3 to 7 for one image: normal, out uint8 [H, W, C]; planes float32 [H, 1+C, W]."""
    height, width, channels = normal.shape
    components = (theta.shape[0] - 1) // (channels + 6)
    component = np.empty((components, 10), np.float64)
    count = _prepare(theta, channels, height, width, component)
    lanes = np.empty(LANES, np.float32)
    power_bits = np.empty(LANES, np.int32)
    power = power_bits.view(np.float32)
    density = np.empty(width + LANES, np.float32)
    ratio = np.empty(width + LANES, np.float32)
    largest = np.float32(0.0)
    for i in range(height):
        y = i * 2.0 / (height - 1) - 1.0
        planes[i] = np.float32(0.0)
        total = planes[i, 0]
        for low in range(0, width, _STRIP):
            high = min(width, low + _STRIP)
            for j in range(count):
                first, stop = _density_row(
                    component[j], y, low, high, width, lanes, power, power_bits, density, ratio
                )
                if stop == 0:
                    continue
                n = stop - first
                color = theta[int(component[j, 8]) * (channels + 6) :]
                visible = density[:n]
                part = total[first:stop]
                for x in range(n):
                    part[x] += visible[x]
                for c in range(channels):
                    v = np.float32(127.5) * (color[c] + np.float32(1.0))
                    part = planes[i, 1 + c, first:stop]
                    for x in range(n):
                        part[x] += visible[x] * v
        for x in range(width):
            largest = max(largest, total[x])
    scale = theta[theta.shape[0] - 1] / largest if largest > 0.0 else np.float32(0.0)
    for i in range(height):
        for x in range(width):
            share = planes[i, 0, x]
            for c in range(channels):
                g = np.float32(normal[i, x, c])
                value = g + scale * (planes[i, 1 + c, x] - share * g) + np.float32(0.5)
                out[i, x, c] = np.uint8(min(max(value, np.float32(0.0)), np.float32(255.0)))


@njit(cache=True, parallel=True)
def render(normals, normal_index, theta, out):
    """Paint theta[i] on normals[normal_index[i]] into out[i], images in parallel.

    normals: uint8 [M, H, W, C]; normal_index: int64 [N]; theta: float32 [N, K(C+6)+1];
    out: uint8 [N, H, W, C], written.
    """
    for i in prange(theta.shape[0]):
        planes = np.empty((out.shape[1], 1 + out.shape[3], out.shape[2]), np.float32)
        _render_image(normals[normal_index[i]], theta[i], out[i], planes)
