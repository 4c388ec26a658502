// Plot of one quantity against another: a panel per model and data, a line per method.
const { quantities } = data;
const hidden = new Set();
let charts = [];

const choose = (id, allowed, initial) => {
  const select = $(id), names = quantities.map(q => q.name);
  for (const [at, q] of quantities.entries())
    if (allowed(q)) select.append(el('option', { value: at }, q.of ? `${q.label}, ${q.of}` : q.label));
  const saved = names.indexOf(state.get(id));
  select.value = saved >= 0 && allowed(quantities[saved]) ? saved : initial;
  select.addEventListener('change', () => { keep(id, quantities[select.value].name); logs(); draw(); });
  return select;
};
const logs = () => {
  for (const id of ['x', 'y']) {
    const at = $(id).value, values = data.settings.map(setting => valueOf(setting, at)).filter(Number.isFinite);
    const [low, high] = [Math.min(...values), Math.max(...values)], box = $(`log${id}`);
    box.disabled = !(low > 0);
    box.checked = !box.disabled && (quantities[at].log || (id === 'x' && high / low > 30));
  }
};
const valueOf = (setting, at) => setting.values[at]?.[0] ?? setting.values[at] ?? NaN;
const barOf = (setting, at) => setting.values[at]?.slice?.(1) ?? [null, null];
const grouping = () => data.series[$('x').value] ?? data.series[''];

const draw = () => {
  const [x, y] = [+$('x').value, +$('y').value], shown = new Set(view.shown), series = grouping();
  const panels = data.panels.map((subject, at) => {
    const points = [];
    series.forEach((line, index) => {
      if (hidden.has(line.name)) return;
      for (const at_ of line.of) {
        const setting = data.settings[at_], point = { at: at_, index, x: valueOf(setting, x), y: valueOf(setting, y) };
        if (setting.panel === at && shown.has(at_) && Number.isFinite(point.x) && Number.isFinite(point.y)
          && (!$('logx').checked || point.x > 0) && (!$('logy').checked || point.y > 0)) points.push(point);
      }
    });
    return { subject, at, points };
  }).filter(panel => panel.points.length);
  legend(series, shown);
  const host = $('panels');
  host.replaceChildren();
  charts = [];
  if (!panels.length) host.append(el('p', { class: 'empty' }, 'No point to draw: no shown setting has both numbers.'));
  const figures = panels.map(({ subject }) => {
    const q = quantities[y], holder = el('div');
    const better = q.higher === null ? '' : `, ${q.higher ? 'higher' : 'lower'} is better`;
    const caption = el('figcaption', {}, el('b', {}, q.label), `${q.of ? ` · ${q.of}` : ''}${better}`, ...(subject ? [el('br'), subject] : []));
    host.append(el('figure', {}, caption, holder));
    return holder;
  });
  panels.forEach((panel, i) => charts.push(chart(figures[i], panel, series, x, y, panels.length)));
};

const legend = (series, shown) => {
  const items = series.filter(line => line.of.some(at => shown.has(at))).map(line => {
    const colour = `var(--series${line.colour})`;
    const sample = svg('svg', { viewBox: '0 0 26 14', 'aria-hidden': true },
      svg('path', { d: 'M0,7H26', stroke: colour, 'stroke-width': 1.8 }), svg('path', { d: marker(line.marker, 13, 7, 4.5), fill: colour }));
    const button = el('button', { type: 'button', 'aria-pressed': !hidden.has(line.name) }, sample, line.name || 'all settings');
    button.addEventListener('click', () => {
      if (!hidden.delete(line.name)) hidden.add(line.name);
      const at = items.findIndex(item => item.contains(button));
      draw();
      $('names').children[at]?.firstChild.focus();
    });
    button.addEventListener('mouseenter', () => light(line.name));
    button.addEventListener('mouseleave', () => light(null));
    return el('li', {}, button);
  });
  $('names').replaceChildren(...items);
};
const light = name => {
  $('panels').classList.toggle('lit', name !== null);
  for (const group of document.querySelectorAll('#panels .series')) group.classList.toggle('on', group.dataset.name === name);
};

const chart = (holder, { subject, at: panel, points }, series, x, y, many) => {
  const width = Math.max(holder.clientWidth, 200);
  const height = Math.round(Math.max(260, Math.min(many > 1 ? 380 : 520, width * (width < 600 ? .85 : .4))));
  const floats = data.settings.filter(s => s.panel === panel && s.float).map(s => valueOf(s, y)).filter(v => Number.isFinite(v) && (!$('logy').checked || v > 0));
  const ys = axis([...points.map(p => p.y), ...floats], $('logy').checked, height - 40, 12, Math.max(3, Math.floor(height / 55)));
  const labels = ys.ticks.map(short), left = 14 + 7 * Math.max(...labels.map(label => label.length), 1);
  const xs = axis(points.map(p => p.x), $('logx').checked, left, width - 14, Math.max(3, Math.floor(width / 90)));
  const place = p => [xs.scale(p.x), ys.scale(p.y)], path = line => `M${line.map(p => place(p).map(v => v.toFixed(1)).join()).join('L')}`;
  const lines = svg('g'), text = (words, px, py, attributes) => svg('text', { x: px, y: py, ...attributes }, words);
  ys.ticks.forEach((tick, i) => lines.append(svg('path', { class: 'grid', d: `M${left},${ys.scale(tick)}H${width - 14}` }),
    text(labels[i], left - 7, ys.scale(tick) + 4, { 'text-anchor': 'end' })));
  xs.ticks.forEach(tick => lines.append(svg('path', { class: 'axis', d: `M${xs.scale(tick)},${height - 40}v5` }),
    text(short(tick), xs.scale(tick), height - 22, { 'text-anchor': 'middle' })));
  lines.append(svg('path', { class: 'axis', d: `M${left},${height - 40}H${width - 14}` }),
    text(quantities[x].of ? `${quantities[x].label}, ${quantities[x].of}` : quantities[x].label, (left + width - 14) / 2, height - 4, { class: 'title', 'text-anchor': 'middle' }));
  if (quantities[x].cost) {  // the best for what it costs
    const front = pareto(points, quantities[y].higher);
    if (front.length > 1) lines.append(svg('path', { class: 'front', d: path(front), 'stroke-width': 8, fill: 'none', 'stroke-linejoin': 'round' }));
  }
  for (const value of new Set(floats)) lines.append(svg('path', { class: 'float', d: `M${left},${ys.scale(value)}H${width - 14}` }),
    text(`float ${short(value)}`, left + 5, ys.scale(value) - 5));
  const crowded = points.length > 150, radius = crowded ? 3.6 : 4.8;
  series.forEach((line, index) => {
    const own = points.filter(p => p.index === index).sort((a, b) => a.x - b.x || a.y - b.y);
    if (!own.length) return;
    const colour = `var(--series${line.colour})`, bars = ['', ''];
    for (const p of own) {
      const [deviation, error] = barOf(data.settings[p.at], y), size = deviation ?? error, [px] = place(p);
      if (!size) continue;
      const [top, bottom] = [ys.scale(p.y + size), ys.scale(ys.clamp(p.y - size))].map(v => Math.max(2, Math.min(v, height - 40)));
      const caps = deviation === null ? '' : `M${px - 3},${top}h6M${px - 3},${bottom}h6`;
      bars[deviation === null ? 1 : 0] += `M${px.toFixed(1)},${top.toFixed(1)}V${bottom.toFixed(1)}${caps}`;
    }
    const joined = line.front ? pareto(own, quantities[y].higher) : own;
    lines.append(svg('g', { class: 'series', 'data-name': line.name },
      svg('path', { class: 'line', d: path(joined), stroke: colour }), svg('path', { class: 'bars', d: bars[0], stroke: colour }),
      svg('path', { class: 'bars soft', d: bars[1], stroke: colour }),
      svg('path', { class: 'marks', d: own.map(p => marker(line.marker, ...place(p), radius)).join(''), fill: colour })));
  });
  const ring = svg('circle', { class: 'ring', r: radius + 3.5, visibility: 'hidden' });
  const picture = svg('svg', { width, height, class: crowded && 'many', viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: 'group',
    'aria-label': `${quantities[y].label} against ${quantities[x].label}${subject ? `, ${subject}` : ''}: ${points.length} points. Arrow keys move between points, Enter opens the row.` }, lines, ring);
  holder.replaceChildren(picture);
  return pointing(picture, ring, points, place, series, x, y);
};

const tell = (setting, at) => {
  const [deviation, error] = barOf(setting, at), q = quantities[at];
  const around = deviation !== null ? ` ± ${short(deviation)} (${setting.count})` : error !== null ? ` (se ${short(error)})` : '';
  return `${q.label}: ${short(valueOf(setting, at))}${around}`;
};
// The point nearest to the mouse, or the next one by the arrow keys.
const pointing = (picture, ring, points, place, series, x, y) => {
  const order = [...points].sort((a, b) => a.x - b.x || a.y - b.y);
  let current = null;
  const show = (point, focus = false) => {
    current = point;
    ring.setAttribute('visibility', point ? 'visible' : 'hidden');
    light(point ? series[point.index].name : null);
    picture.style.cursor = point ? 'pointer' : '';
    if (!point) { say(''); return; }
    const [px, py] = place(point), box = picture.getBoundingClientRect(), setting = data.settings[point.at];
    ring.setAttribute('cx', px);
    ring.setAttribute('cy', py);
    const words = `${setting.number}. ${setting.words}\n${tell(setting, y)}\n${tell(setting, x)}`;
    say(`${words}\n${focus ? 'Enter' : 'Click'}: command, folders, layers`, box.left + px, box.top + py);
  };
  picture.addEventListener('mousemove', event => {
    const box = picture.getBoundingClientRect(), [mx, my] = [event.clientX - box.left, event.clientY - box.top];
    const far = p => Math.hypot(place(p)[0] - mx, place(p)[1] - my);
    const near = order.reduce((best, p) => far(p) < far(best) ? p : best, order[0]);
    show(near && far(near) < 30 ? near : null);
  });
  picture.addEventListener('mouseleave', () => show(null));
  picture.addEventListener('blur', () => show(null));
  picture.addEventListener('click', () => { if (current) { const { at } = current; show(null); reveal(at); } });
  picture.addEventListener('keydown', event => {
    const at = order.indexOf(current), last = order.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? last : at - 1, Home: 0, End: last }[event.key];
    if (event.key === 'Enter' && current) { const { at: row } = current; show(null); reveal(row); }
    else if (event.key === 'Escape') show(null);
    else if (to !== undefined) { event.preventDefault(); show(order[Math.max(0, Math.min(to, last))], true); }
  });
  return { show, points };
};

choose('y', q => q.measured, data.y);
choose('x', () => true, data.x);
for (const id of ['logx', 'logy']) $(id).addEventListener('change', draw);
logs();
let planned = 0, drawnAt = 0;
new ResizeObserver(() => {
  if ($('panels').clientWidth === drawnAt) return;
  cancelAnimationFrame(planned);
  planned = requestAnimationFrame(() => { drawnAt = $('panels').clientWidth; draw(); });
}).observe($('panels'));
drawnAt = $('panels').clientWidth;
view.followers.push(draw);
const [column, direction] = (state.get('sort') ?? '').split('.');
if (heads[column]?.querySelector('.sort') && ['ascending', 'descending'].includes(direction)) sort(+column, direction);
theme !== 'auto' && (root.dataset.theme = theme);
$('theme').textContent = `Theme: ${theme}`;
filter();
root.dataset.ready = '';
