// Data, state in the address, theme and tooltip. Text from runs enters the page as text nodes only.
const data = JSON.parse(document.getElementById('data').textContent);
const $ = id => document.getElementById(id);
const root = document.documentElement;

const fill = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes))
    if (value !== false && value != null) node.setAttribute(name, value === true ? '' : value);
  node.append(...children);
  return node;
};
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);

// The state of the view is in the address, so that a view can be bookmarked and sent.
const state = new URLSearchParams(location.hash.slice(1));
const keep = (name, value) => {
  if (value === '' || value == null) state.delete(name); else state.set(name, value);
  const text = state.toString();
  try { history.replaceState(null, '', text ? `#${text}` : location.pathname + location.search); }
  catch { /* some browsers refuse it for files */ }
};

// What the filter leaves, by the index of a setting; parts of the page register what follows from it.
const view = { shown: data.settings.map((_, at) => at), rows: [], followers: [] };
const changed = () => view.followers.forEach(follow => follow());

const THEMES = ['auto', 'light', 'dark'];
const stored = value => {
  try {
    if (value === undefined) return localStorage.getItem('qexp-theme');
    localStorage.setItem('qexp-theme', value);
  } catch { /* files have no storage in some browsers */ }
  return null;
};
const paint = theme => {
  if (theme === 'auto') delete root.dataset.theme; else root.dataset.theme = theme;
  $('theme').textContent = `Theme: ${theme}`;
  changed();
};
const isDark = () => root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
let theme = THEMES.includes(stored()) ? stored() : 'auto';
$('theme').addEventListener('click', () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  stored(theme);
  paint(theme);
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', changed);

const tip = $('tip');
const say = (text, x, y) => {
  tip.style.visibility = text ? 'visible' : 'hidden';
  if (!text) return;
  tip.textContent = text;
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 16 + height > innerHeight ? Math.max(4, y - height - 12) : y + 16}px`;
};
document.addEventListener('scroll', () => say(''), { passive: true, capture: true });

const short = value => {
  const size = Math.abs(value);
  if (value === 0) return '0';
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2).replace(/\.?0+e\+?/, 'e');
  return Number(value.toPrecision(size >= 1000 ? 6 : 4)).toLocaleString('en', { maximumFractionDigits: 8 });
};
