// Table: filter, choices, order, and the details of a row.
const table = $('table'), body = table.tBodies[0];
const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
view.rows = [...body.rows].map((tr, at) => ({
  tr, at, detail: null, settings: data.rows[at], button: tr.querySelector('button'),
}));
const textOf = (tr, column) => tr.cells[column].textContent;
const haystack = row => row.text ??= [
  ...[...row.tr.cells].map((_, column) => textOf(row.tr, column)),
  ...row.settings.flatMap(at => data.settings[at].runs.map(run => `${run.command} ${run.folder}`)),
].join(' ').toLowerCase();
const natural = new Intl.Collator('en', { numeric: true }).compare;

// One choice for each column of labels that has several values, unless nearly all rows differ in it.
const picked = new Map();
for (const [column, head] of heads.entries()) {
  if (head.dataset.choice === undefined) continue;
  const counts = new Map();
  for (const { tr } of view.rows) counts.set(textOf(tr, column), (counts.get(textOf(tr, column)) ?? 0) + 1);
  if (counts.size < 2 || counts.size > 60) continue;
  const name = head.dataset.choice, chosen = new Set(state.getAll(`pick.${name}`).filter(v => counts.has(v)));
  const title = el('summary', {}, name), list = el('div', { role: 'group', 'aria-label': name });
  const choice = el('details', { class: 'choice' }, title, list);
  const show = () => {
    choice.classList.toggle('on', chosen.size > 0);
    title.textContent = chosen.size ? `${name}: ${[...chosen].map(v => v || '(none)').join(', ').slice(0, 30)}` : name;
    for (const box of list.querySelectorAll('input')) box.checked = chosen.has(box.value);
  };
  for (const [value, count] of [...counts].sort((a, b) => natural(a[0], b[0]))) {
    const box = el('input', { type: 'checkbox', value });
    box.addEventListener('change', () => {
      chosen[box.checked ? 'add' : 'delete'](value);
      state.delete(`pick.${name}`);
      for (const each of chosen) state.append(`pick.${name}`, each);
      show();
      filter();
    });
    list.append(el('label', {}, box, el('span', {}, value || '(none)'), el('small', {}, String(count))));
  }
  choice.addEventListener('keydown', event => {
    if (event.key === 'Escape') { choice.open = false; title.focus(); }
  });
  choice.addEventListener('toggle', () => {
    if (!choice.open) return;
    list.style.left = '';
    const wide = list.getBoundingClientRect().right - innerWidth + 8;
    if (wide > 0) list.style.left = `${-wide}px`;
  });
  picked.set(column, { chosen, show, choice, name });
  $('choices').append(choice);
  show();
}
document.addEventListener('click', event => {
  for (const { choice } of picked.values()) if (!choice.contains(event.target)) choice.open = false;
});

const shows = (row, words) =>
  [...picked].every(([column, { chosen }]) => !chosen.size || chosen.has(textOf(row.tr, column)))
  && words.every(word => haystack(row).includes(word));
const filter = () => {
  const words = $('query').value.toLowerCase().split(/\s+/).filter(Boolean);
  let left = 0;
  view.shown = [];
  for (const row of view.rows) {
    row.tr.hidden = !shows(row, words);
    if (row.detail) row.detail.hidden = row.tr.hidden;
    if (row.tr.hidden) continue;
    left += 1;
    view.shown.push(...row.settings);
  }
  const all = view.rows.length, filtered = left < all;
  $('count').textContent = filtered ? `${left} of ${all} rows` : `${all} rows`;
  $('clear').hidden = !words.length && ![...picked.values()].some(({ chosen }) => chosen.size);
  $('none').hidden = left > 0;
  keep('q', $('query').value.trim());
  roving();
  changed();
};
$('query').value = state.get('q') ?? '';
$('query').addEventListener('input', filter);
$('clear').addEventListener('click', () => {
  $('query').value = '';
  for (const { chosen, show, name } of picked.values()) { chosen.clear(); state.delete(`pick.${name}`); show(); }
  filter();
  $('query').focus();
});

// Rows: one of them is in the tab order, the arrow keys move between them.
const visible = () => view.rows.filter(row => !row.tr.hidden);
const roving = (chosen = visible().find(row => row.button.tabIndex === 0) ?? visible()[0]) => {
  for (const row of view.rows) row.button.tabIndex = row === chosen ? 0 : -1;
};
const of = node => view.rows.find(row => row.tr === node);
const open = (row, wanted = !row.detail) => {
  row.button.setAttribute('aria-expanded', wanted);
  if (!wanted) { row.detail?.remove(); row.detail = null; return; }
  if (row.detail) return;
  const parts = row.settings.map(at => details(at, row.settings.length > 1));
  row.detail = el('tr', { class: 'detail' }, el('td', { colspan: heads.length }, el('div', {}, ...parts)));
  row.tr.after(row.detail);
  row.detail.querySelectorAll('canvas').forEach(drawMap);
};
const details = (at, several) => {
  const setting = data.settings[at];
  const parts = several || setting.runs.length > 1 ? [el('h3', {}, `${setting.number}. ${setting.words}`)] : [];
  for (const run of setting.runs) {
    parts.push(el('code', {}, run.command));
    const list = el('dl');
    for (const [name, value] of Object.entries(run))
      if (name !== 'command' && value) list.append(el('dt', {}, name), el('dd', {}, value));
    parts.push(list);
  }
  return setting.layers ? el('div', {}, ...parts, el('div', { class: 'maps' }, mapFigure(at))) : el('div', {}, ...parts);
};
body.addEventListener('click', event => {
  const row = of(event.target.closest('tr'));
  const selecting = !event.target.closest('button') && String(getSelection());
  if (row && !selecting) { roving(row); open(row); }
});
body.addEventListener('keydown', event => {
  const row = event.target.closest('button.row') && of(event.target.closest('tr'));
  if (!row) return;
  const rows = visible(), at = rows.indexOf(row);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (to === undefined || !rows[to]) return;
  event.preventDefault();
  roving(rows[to]);
  rows[to].button.focus();
});
const reveal = at => {
  const row = view.rows.find(each => each.settings.includes(at));
  roving(row);
  open(row, true);
  row.button.focus({ preventScroll: true });
  row.tr.scrollIntoView({ block: 'center' });
};

// Order: a click sorts upwards, downwards, then as before. Empty cells are always last.
const sort = (column, direction) => {
  const head = heads[column];
  for (const each of heads) each.setAttribute('aria-sort', each === head && direction ? direction : 'none');
  const sign = direction === 'descending' ? -1 : 1;
  const key = row => row.tr.cells[column].dataset.value ?? textOf(row.tr, column);
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === '' || y === '') return (x === '') - (y === '');
    return sign * (isNaN(x) || isNaN(y) ? natural(x, y) : x - y) || a.at - b.at;
  };
  view.rows.sort(direction ? compare : (a, b) => a.at - b.at);
  body.append(...view.rows.flatMap(({ tr, detail }) => detail ? [tr, detail] : [tr]));
  view.shown = visible().flatMap(row => row.settings);
  keep('sort', direction ? `${column}.${direction}` : '');
};
table.tHead.addEventListener('click', event => {
  const head = event.target.closest('.sort')?.closest('th');
  if (!head) return;
  const next = { none: 'ascending', ascending: 'descending', descending: null };
  sort(heads.indexOf(head), next[head.getAttribute('aria-sort')]);
  changed();
});

document.addEventListener('keydown', event => {
  const typing = event.target.matches('input:not([type=checkbox]), select, textarea');
  if (event.key === '/' && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $('query').focus();
    $('query').select();
  } else if (event.key === 'Escape' && event.target === $('query')) {
    if ($('query').value) { $('query').value = ''; filter(); } else $('query').blur();
  }
});
