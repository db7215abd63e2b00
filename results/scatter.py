"""A scatter picture on logarithmic axes as SVG, legible on light and dark pages."""
import html
import math
import statistics

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 720, 480, 58, 46, 14  # pixels
SVG_HEAD = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
COLOURS = ("#e36209", "#0a84c6", "#8250df", "#2da44e", "#bf3989", "#9a8400", "#1b9e9e", "#d1414b",
           "#f0558a")
STYLE = ("text{font:13px system-ui,sans-serif;fill:#1f2328}.axis{font-size:11px;fill:#59636e}"
         "path{stroke:#d1d9e0;fill:none}.goal{fill:#1f2328;stroke:none}"
         "@media(prefers-color-scheme:dark){text,.goal{fill:#f0f6fc}.axis{fill:#9198a1}"
         "path{stroke:#3d444d}}")
STAR = [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5))
        for i, r in enumerate([11, 4.5] * 5)]


class Axis:
    """Values to pixels, on a logarithmic scale."""

    def __init__(self, values, start, end):
        low, high = min(values) / 1.3, max(values) * 1.3
        self.start, self.low = start, math.log(low)
        self.slope = (end - start) / (math.log(high) - self.low)
        steps = (m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5))
        self.ticks = [t for t in steps if low <= t <= high]

    def __call__(self, value):
        return self.start + self.slope * (math.log(value) - self.low)


def svg_scatter(groups, goals, x_name, y_name, least=0.01):
    """groups {name: [(x, y), ...]}, the first point drawn as a ring; goals {name: (x, y)}.

    The first goal is a star. What is below `least` is drawn there, what has no number nowhere.
    """
    def clean(points):
        return [[max(least, v) for v in point] for point in points if None not in point]

    groups = {name: clean(points) for name, points in groups.items() if clean(points)}
    goals = {name: clean([point])[0] for name, point in goals.items() if clean([point])}
    xs, ys = zip(*goals.values(), *(p for points in groups.values() for p in points), strict=True)
    x, y = Axis(xs, LEFT, WIDTH - EDGE), Axis(ys, HEIGHT - BOTTOM, EDGE)
    parts, taken, labels = axes(x, y, x_name, y_name), [], []
    for i, (name, points) in enumerate(groups.items()):
        colour = COLOURS[i % len(COLOURS)]
        for j, (a, b) in enumerate(points):
            fill = f'fill="{colour}"' if j else 'fill="none"'
            parts.append(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="5" {fill} '
                         f'stroke="{colour}" stroke-width="2"/>')
            taken.append((x(a) - 7, y(b) - 7, x(a) + 7, y(b) + 7))
        a, b = (statistics.median_low(values) for values in zip(*points, strict=True))
        labels.append((name, x(a), y(b), f'style="fill:{colour};font-weight:600"'))
    for i, (name, (a, b)) in enumerate(goals.items()):
        corners = STAR if i == 0 else [(-6, -6), (6, -6), (6, 6), (-6, 6)]
        corners = " ".join(f"{x(a) + dx:.1f},{y(b) + dy:.1f}" for dx, dy in corners)
        parts.append(f'<polygon class="goal" points="{corners}"/>')
        taken.append((x(a) - 11, y(b) - 11, x(a) + 11, y(b) + 11))
        labels.append((name, x(a), y(b), ""))
    parts += [place(*label, taken) for label in reversed(labels)]  # the goals first
    return (f"{SVG_HEAD}<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n")


def axes(x, y, x_name, y_name):
    floor, middle = HEIGHT - BOTTOM, (HEIGHT - BOTTOM) / 2
    parts = [f'<path d="M{x(t):.1f} {EDGE}V{floor}"/><text class="axis" text-anchor="middle" '
             f'x="{x(t):.1f}" y="{floor + 15}">{t:g}</text>' for t in x.ticks]
    parts += [f'<path d="M{LEFT} {y(t):.1f}H{WIDTH - EDGE}"/><text class="axis" text-anchor="end" '
              f'x="{LEFT - 6}" y="{y(t) + 4:.1f}">{t:g}</text>' for t in y.ticks]
    parts += [f'<text text-anchor="middle" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}">'
              f"{html.escape(x_name)}</text>",
              f'<text text-anchor="middle" transform="translate(15 {middle})rotate(-90)">'
              f"{html.escape(y_name)}</text>"]
    return parts


def place(name, x, y, style, taken):
    """A label, as near to (x, y) as there is room among the boxes `taken`; it is added to them."""
    wide = 7.4 * len(name)
    for r in range(12, 200, 6):
        for dx, dy in ((r, 4), (-r - wide, 4), (-wide / 2, -r), (-wide / 2, r + 8),
                       (r, -r), (r, r), (-r - wide, -r), (-r - wide, r)):
            left, base = x + dx, y + dy
            box = left, base - 11, left + wide, base + 3
            inside = LEFT < left and left + wide < WIDTH and EDGE < base < HEIGHT - BOTTOM
            if inside and not any(overlap(box, other) for other in taken):
                taken.append(box)
                return f'<text x="{left:.1f}" y="{base:.1f}" {style}>{html.escape(name)}</text>'
    return ""


def overlap(a, b):
    """Whether two boxes (left, top, right, bottom) share a pixel."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
