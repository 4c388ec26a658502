// Axes: limits, ticks and the map from values to pixels.
const span = (values, log) => {
  const kept = values.filter(v => Number.isFinite(v) && (!log || v > 0));
  let [low, high] = [Math.min(...kept), Math.max(...kept)];
  if (low === high) [low, high] = log ? [low / 1.5, high * 1.5] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const [a, b] = log ? [Math.log10(low), Math.log10(high)] : [low, high], room = (b - a) * .05;
  return log ? [10 ** (a - room), 10 ** (b + room)] : [a - room, b + room];
};
const linearTicks = (low, high, most) => {
  const raw = (high - low) / Math.max(most, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(each => each * power >= raw) * power, ticks = [];
  for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9; at++) ticks.push(Number((at * step).toPrecision(12)));
  return ticks;
};
const logTicks = (low, high, most) => {
  if (high / low < 5) return linearTicks(low, high, most);
  for (const parts of [[1, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      ticks.push(...parts.map(part => Number((part * 10 ** power).toPrecision(3))).filter(t => t >= low && t <= high));
    if (ticks.length <= most) return ticks;
    if (parts.length === 1) return ticks.filter((_, at) => at % Math.ceil(ticks.length / most) === 0);
  }
  return [];
};
const axis = (values, log, from, to, most) => {
  const [low, high] = span(values, log), turn = log ? Math.log : v => v;
  const scale = value => from + (turn(value) - turn(low)) / (turn(high) - turn(low)) * (to - from);
  return { scale, ticks: (log ? logTicks : linearTicks)(low, high, most), clamp: v => log && !(v > low) ? low : v };
};

// The same rule as `pareto` in plots.py: points in the order of x, each better than all before it.
const pareto = (points, higher) => {
  const front = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || (higher ? b.y - a.y : a.y - b.y)))
    if (!front.length || (higher ? point.y > front[front.length - 1].y : point.y < front[front.length - 1].y)) front.push(point);
  return front;
};

// Markers by matplotlib's letters, so that the page and the PNG plots agree.
const corners = (r, ...at) => `M${at.map(([x, y]) => `${(x * r).toFixed(1)},${(y * r).toFixed(1)}`).join('L')}Z`;
const SHAPES = {
  o: r => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  s: r => corners(r, [-.9, -.9], [.9, -.9], [.9, .9], [-.9, .9]),
  '^': r => corners(r, [0, -1.15], [1.1, .9], [-1.1, .9]),
  v: r => corners(r, [0, 1.15], [1.1, -.9], [-1.1, -.9]),
  '<': r => corners(r, [-1.15, 0], [.9, -1.1], [.9, 1.1]),
  '>': r => corners(r, [1.15, 0], [-.9, -1.1], [-.9, 1.1]),
  D: r => corners(r, [0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]),
  P: r => corners(r, [-.4, -1.1], [.4, -1.1], [.4, -.4], [1.1, -.4], [1.1, .4], [.4, .4], [.4, 1.1], [-.4, 1.1], [-.4, .4], [-1.1, .4], [-1.1, -.4], [-.4, -.4]),
  X: r => corners(r, [-1.1, -.6], [-.6, -1.1], [0, -.5], [.6, -1.1], [1.1, -.6], [.5, 0], [1.1, .6], [.6, 1.1], [0, .5], [-.6, 1.1], [-1.1, .6], [-.5, 0]),
};
const marker = (letter, x, y, r) => SHAPES[letter](r).replace(/^M([-\d.]+),([-\d.]+)/, (_, dx, dy) =>
  `M${(x + +dx).toFixed(1)},${(y + +dy).toFixed(1)}`).replace(/L([-\d.]+),([-\d.]+)/g, (_, dx, dy) =>
  `L${(x + +dx).toFixed(1)},${(y + +dy).toFixed(1)}`);
