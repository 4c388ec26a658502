// Heat maps by layer, each one canvas: a row per block, a column per linear. Of errors, and of stored bits where linears differ.
const MAPS = 24;  // drawn at a time
const { layers } = data;

const ERRORS = 1, BITS = 2;  // places in a setting's `layers`
const shadeOf = (value, kind) => {
  if (!(value > 0)) return null;
  const axis = kind === BITS ? Number : Math.log, limits = kind === BITS ? layers.bits : layers.limits;
  const [low, high] = limits.map(axis), last = layers.shades.length - 1;
  const share = Math.min(Math.max((axis(value) - low) / Math.max(high - low, 1e-9), 0), 1);
  const at = Math.round(share * last);
  return layers.shades[isDark() ? last - at : at];  // the largest error stands out from the page
};
const geometry = grid => {
  const cell = Math.max(16, Math.min(26, Math.floor(230 / grid.kinds.length)));
  const line = Math.max(3, Math.min(14, Math.floor(260 / grid.blocks.length)));
  const above = 10 + 5.6 * Math.max(...grid.kinds.map(kind => kind.length));
  return { cell, line, left: 26, above };
};
const mapFigure = at => {
  const setting = data.settings[at], [index, errors, bits] = setting.layers, grid = layers.grids[index];
  const worst = errors.reduce((best, error, i) => error > (errors[best] ?? -1) ? i : best, 0);
  const label = `Error by layer; largest: ${grid.names[worst]} ${short(errors[worst] ?? 0)}`;
  return el('figure', {},
    el('figcaption', {}, el('b', {}, String(setting.number)), ` ${setting.words}`),
    el('canvas', { role: 'img', 'aria-label': label, 'data-setting': at, 'data-kind': ERRORS }),
    ...bits ? bitsMap(at, bits) : []);
};
const bitsMap = (at, bits) => {
  const words = `Stored bits per weight, ${short(Math.min(...bits))} to ${short(Math.max(...bits))}`;
  return [el('figcaption', {}, words), el('canvas', { role: 'img', 'aria-label': words, 'data-setting': at, 'data-kind': BITS })];
};
const drawMap = canvas => {
  const kind = +canvas.dataset.kind, setting = data.settings[canvas.dataset.setting].layers;
  const values = setting[kind], grid = layers.grids[setting[0]];
  const { cell, line, left, above } = geometry(grid), scale = devicePixelRatio || 1;
  const width = left + cell * grid.kinds.length + 8, height = above + line * grid.blocks.length + 2;
  Object.assign(canvas, { width: width * scale, height: height * scale });
  canvas.style.width = `${width}px`;
  const pen = canvas.getContext('2d'), quiet = getComputedStyle($('tip').parentNode).color;
  pen.scale(scale, scale);
  pen.font = '10px system-ui, sans-serif';
  pen.fillStyle = quiet;
  pen.textBaseline = 'middle';
  grid.kinds.forEach((kind, column) => {
    pen.save();
    pen.translate(left + (column + .5) * cell, above - 4);
    pen.rotate(-Math.PI / 2);
    pen.fillText(kind, 0, 0);
    pen.restore();
  });
  pen.textAlign = 'right';
  const step = Math.ceil(10 / line), every = grid.blocks.length > 12 ? Math.max(step, 5) : step;
  grid.blocks.forEach((block, row) => {
    if (row % every === 0) pen.fillText(block, left - 5, above + (row + .5) * line);
  });
  grid.cells.forEach(([row, column], at) => {
    const shade = shadeOf(values[at], kind);
    if (shade === null) return;
    pen.fillStyle = shade;
    pen.fillRect(left + column * cell, above + row * line, cell - 1, line - (line > 4 ? 1 : .5));
  });
};
document.addEventListener('mousemove', event => {
  const canvas = event.target.closest?.('canvas[data-setting]');
  if (!canvas) { if (!event.target.closest?.('#panels')) say(''); return; }
  const kind = +canvas.dataset.kind, setting = data.settings[canvas.dataset.setting].layers;
  const value = at => setting[kind][at] == null ? 'not finite' : setting[kind][at].toPrecision(3) + (kind === BITS ? ' bits' : '');
  const grid = layers.grids[setting[0]];
  const { cell, line, left, above } = geometry(grid), box = canvas.getBoundingClientRect();
  const shrunk = canvas.offsetWidth / parseFloat(canvas.style.width);
  const column = Math.floor(((event.clientX - box.left) / shrunk - left) / cell);
  const row = Math.floor(((event.clientY - box.top) / shrunk - above) / line);
  const at = grid.cells.findIndex(([r, c]) => r === row && c === column);
  say(at < 0 ? '' : `${grid.names[at]}: ${value(at)}`, event.clientX, event.clientY);
});

if (layers) {
  let many = MAPS;
  const refresh = () => {
    const bar = $('bar').getContext('2d'), [width, height] = [bar.canvas.width, bar.canvas.height] = [layers.shades.length, 1];
    (isDark() ? [...layers.shades].reverse() : layers.shades).forEach((shade, at) => {
      bar.fillStyle = shade;
      bar.fillRect(at, 0, width, height);
    });
    document.querySelectorAll('.detail canvas').forEach(drawMap);
    if (!$('maps').open) return;
    const shown = view.shown.filter(at => data.settings[at].layers);
    $('figures').replaceChildren(...shown.slice(0, many).map(mapFigure));
    $('figures').querySelectorAll('canvas').forEach(drawMap);
    $('more').hidden = shown.length <= many;
    $('more').textContent = `Show ${Math.min(MAPS, shown.length - many)} more of ${shown.length}`;
  };
  $('maps').addEventListener('toggle', refresh);
  $('more').addEventListener('click', () => { many += MAPS; refresh(); });
  view.followers.push(refresh);
}
