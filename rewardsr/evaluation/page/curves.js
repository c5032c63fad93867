/* Curves of all runs, a chart a metric: bands are intervals, dashed lines the base. */
const COLOURS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#b08900', '#4aa3df', '#8a5a00', '#7a7a7a'];
const DASHES = ['', '7 3', '2 3', '9 3 2 3'];
const FRAME = { width: 360, height: 200, left: 52, right: 8, top: 8, bottom: 24 };
const hiddenRuns = new Set();

const colour = (run) => COLOURS[run % COLOURS.length];

/* Round numbers that cover a range, about so many. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= 0.8 * rough);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high + step * 1e-6; at += 1) found.push(+(at * step).toPrecision(12));
  return found;
}

function scales(series) {
  const points = series.flatMap((one) => one.points);
  const steps = points.map((point) => point[0]);
  const values = [...points.flatMap((point) => point.slice(1)), ...series.flatMap((one) => (one.base === undefined ? [] : [one.base]))];
  const ends = (list) => list.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const [first, last] = ends(steps);
  let [low, high] = ends(values);
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  [low, high] = [low - margin, high + margin];
  const wide = FRAME.width - FRAME.left - FRAME.right;
  const tall = FRAME.height - FRAME.top - FRAME.bottom;
  return {
    first, last, low, high,
    x: (step) => FRAME.left + wide * (last > first ? (step - first) / (last - first) : 0.5),
    y: (value) => FRAME.top + tall * (high - value) / (high - low),
  };
}

function axes(scale) {
  const parts = [];
  const [right, bottom] = [FRAME.width - FRAME.right, FRAME.height - FRAME.bottom];
  for (const value of ticks(scale.low, scale.high, 4)) {
    const y = scale.y(value);
    parts.push(svg('line', { class: 'rule', x1: FRAME.left, x2: right, y1: y, y2: y }));
    parts.push(svg('text', { x: FRAME.left - 5, y: y + 4, 'text-anchor': 'end' }, brief(value)));
  }
  for (const step of ticks(scale.first, scale.last, 5).filter(Number.isInteger)) {
    const anchor = scale.x(step) > right - 12 ? 'end' : 'middle';
    parts.push(svg('text', { x: scale.x(step), y: bottom + 15, 'text-anchor': anchor }, String(step)));
  }
  return parts;
}

function lines(scale, series) {
  const path = (points) => points.map(([step, value], at) => `${at ? 'L' : 'M'}${scale.x(step).toFixed(1)} ${scale.y(value).toFixed(1)}`).join('');
  const bases = new Set();
  return series.flatMap((one) => {
    const parts = [];
    const banded = one.points.filter((point) => point.length === 4);
    if (banded.length) {
      const there = banded.map((point) => [point[0], point[3]]);
      const back = banded.map((point) => [point[0], point[2]]).reverse();
      const around = `${path(there)}${path(back).replace('M', 'L')}Z`;
      if (banded.length > 1) parts.push(svg('path', { class: 'band', d: around, fill: colour(one.run) }));
      for (const [step, , low, high] of banded) {
        parts.push(svg('line', { x1: scale.x(step), x2: scale.x(step), y1: scale.y(low), y2: scale.y(high), stroke: colour(one.run) }));
      }
    }
    if (one.base !== undefined && !bases.has(one.base)) {
      bases.add(one.base);
      parts.push(svg('line', {
        class: 'base', x1: FRAME.left, x2: FRAME.width - FRAME.right, y1: scale.y(one.base), y2: scale.y(one.base), stroke: 'currentColor',
      }));
    }
    parts.push(svg('path', { class: 'curve', d: path(one.points), stroke: colour(one.run), 'stroke-dasharray': DASHES[one.run % DASHES.length] }));
    if (one.points.length < 40) {
      for (const [step, value] of one.points) parts.push(svg('circle', { cx: scale.x(step), cy: scale.y(value), r: 2.5, fill: colour(one.run) }));
    }
    return parts;
  });
}

/* What all runs have at the step nearest to the one pointed at. */
function reading(series, step) {
  return series.map((one) => {
    const near = one.points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
    const band = near.length === 4 ? ` [${brief(near[2])}, ${brief(near[3])}]` : '';
    return `${data.runs[one.run]}, step ${near[0]}: ${brief(near[1])}${band}`;
  }).join(' · ');
}

function drawChart(chart) {
  const series = chart.series.filter((one) => !hiddenRuns.has(one.run));
  const every = Math.max(...chart.series.map((one) => one.every));
  const meaning = every > 1 ? `${chart.meaning}; a point is the mean of ${every} steps` : chart.meaning;
  const element = make('div', { className: 'chart' }, make('h4', {}, chart.title), make('p', { className: 'quiet' }, meaning));
  if (!series.length) return element;
  const scale = scales(series);
  const cursor = svg('line', { class: 'cursor', y1: FRAME.top, y2: FRAME.height - FRAME.bottom, visibility: 'hidden' });
  const drawing = svg('svg', {
    viewBox: `0 0 ${FRAME.width} ${FRAME.height}`, role: 'img', tabindex: 0, 'aria-label': `${chart.title} over steps; arrow keys read values`,
  }, ...axes(scale), ...lines(scale, series), cursor);
  const read = make('p', { className: 'reading', 'aria-live': 'polite' }, reading(series, scale.last));
  const steps = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  let at = steps.length - 1;
  const point = (place) => {
    at = clamp(place, 0, steps.length - 1);
    cursor.setAttribute('x1', scale.x(steps[at]));
    cursor.setAttribute('x2', scale.x(steps[at]));
    cursor.setAttribute('visibility', 'visible');
    read.textContent = reading(series, steps[at]);
  };
  const follow = (event) => {
    const box = drawing.getBoundingClientRect();
    const x = (event.clientX - box.left) * FRAME.width / box.width;
    point(steps.reduce((best, step, place) => (Math.abs(scale.x(step) - x) < Math.abs(scale.x(steps[best]) - x) ? place : best), 0));
  };
  drawing.addEventListener('pointermove', follow);
  drawing.addEventListener('pointerdown', follow);
  drawing.addEventListener('keydown', (event) => {
    const place = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (place === undefined) return;
    point(place);
    event.preventDefault();
  });
  element.append(drawing, read);
  return element;
}

function drawCharts() {
  const groups = [...new Set(data.charts.map((chart) => chart.group))];
  const open = new Map([...byId('charts').children].map((part) => [part.dataset.group, part.open]));
  byId('charts').replaceChildren(...groups.map((group, place) => {
    const found = data.charts.filter((chart) => chart.group === group).map(drawChart);
    const part = make('details', { open: open.get(group) ?? place < 2 }, make('summary', {}, group),
      make('p', { className: 'quiet' }, data.groups[group]), make('div', { className: 'grid' }, ...found));
    part.dataset.group = group;
    return part;
  }));
}

if (data.charts.length) {
  byId('curves').hidden = false;
  byId('legend').replaceChildren(...data.runs.map((name, run) => {
    const swatch = make('span', { className: 'swatch' });
    swatch.style.borderColor = colour(run);
    if (DASHES[run % DASHES.length]) swatch.style.borderTopStyle = 'dashed';
    const button = make('button', { type: 'button', 'aria-pressed': 'true' }, swatch, name);
    button.addEventListener('click', () => {
      if (!hiddenRuns.delete(run)) hiddenRuns.add(run);
      button.setAttribute('aria-pressed', !hiddenRuns.has(run));
      drawCharts();
    });
    return button;
  }));
  drawCharts();
}
for (const link of document.querySelectorAll('nav a')) {
  const target = document.querySelector(link.getAttribute('href'));
  link.hidden = !target || target.hidden;
}
