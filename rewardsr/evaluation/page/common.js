const data = JSON.parse(document.getElementById('data').textContent);
const byId = (id) => document.getElementById(id);

/* An element with properties and children; text is set as text, never as markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const options = (select, names) => select.replaceChildren(...names.map((name) => make('option', { value: name }, name)));
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/* A number in at most so many significant digits, with a minus sign that is one. */
function brief(value, signed = false, digits = 4) {
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(digits));
  return (signed && value > 0 ? '+' : '') + text.replace('-', '\u2212');
}

const themes = ['system', 'light', 'dark'];
function setTheme(name) {
  if (name === 'system') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  byId('theme').textContent = `Theme: ${name}`;
  try { localStorage.setItem('rewardsr-theme', name); } catch { /* a browser may keep nothing for files */ }
}
let theme = 'system';
try { theme = themes.find((name) => name === localStorage.getItem('rewardsr-theme')) ?? theme; } catch { /* as above */ }
setTheme(theme);
byId('theme').addEventListener('click', () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  setTheme(theme);
});
