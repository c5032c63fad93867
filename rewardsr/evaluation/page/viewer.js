/* Two versions of a picture with a border to move, zoomed and moved together, and what differs between them. */
const view = { picture: 0, left: '', right: '', border: 50, scale: 1, x: 0, y: 0, difference: false };
const MOST_ZOOM = 32;
const stage = byId('stage');

const current = () => data.pictures[view.picture];
const source = (label) => data.blobs[(current().images.find(([name]) => name === label) ?? current().images[0])[1]];

function showPicture(place) {
  view.picture = (place + data.pictures.length) % data.pictures.length;
  const labels = current().images.map(([label]) => label);
  byId('picture').selectedIndex = view.picture;
  for (const [side, fallback] of [['left', 'base'], ['right', '']]) {
    options(byId(side), labels);
    // What is chosen stays chosen from picture to picture; at first the base beside the first tuned one.
    const other = (label) => !/^(LQ|base|HQ)( |$)/.test(label) && (side === 'left' || label !== view.left);
    const tuned = labels.find(other) ?? labels.at(-1);
    if (!labels.includes(view[side])) view[side] = labels.includes(fallback) ? fallback : tuned;
    byId(side).value = view[side];
  }
  showSides();
}

function showSides() {
  for (const side of ['left', 'right']) {
    view[side] = byId(side).value;
    const image = byId(`${side}-image`);
    image.src = source(view[side]);
    image.alt = `${current().name}: ${view[side]}`;
    byId(`${side}-corner`).textContent = view[side];
  }
  showPictureScores();
  Promise.all(['left', 'right'].map((side) => byId(`${side}-image`).decode())).then(fitStage, () => {});
}

/* What both sides score, where they were scored. */
function showPictureScores() {
  const [left, right] = [view.left, view.right].map((label) => current().scores[label] ?? {});
  const names = [...new Set([...Object.keys(left), ...Object.keys(right)])];
  const cell = (value, signed) => make('td', {}, value === undefined || Number.isNaN(value) ? '\u2013' : brief(value, signed));
  const heads = ['metric', view.left, view.right, 'change'].map((text) => make('th', { scope: 'col' }, text));
  byId('scores').replaceChildren(...(names.length ? [make('table', {},
    make('thead', {}, make('tr', {}, ...heads)),
    make('tbody', {}, ...names.map((name) => make('tr', {}, make('th', { scope: 'row' }, name),
      cell(left[name]), cell(right[name]), cell(right[name] - left[name], true))))) ] : []));
}

/* The picture as large as the window allows, in its proportions. */
function fitStage() {
  const image = byId('right-image');
  if (!image.naturalWidth) return;
  const whole = byId('stages').clientWidth;
  const beside = view.difference && whole >= 720;
  const room = beside ? (whole - 12) / 2 : whole;
  const width = Math.floor(Math.min(room, 0.78 * innerHeight * image.naturalWidth / image.naturalHeight));
  for (const element of [stage, byId('difference-stage')]) {
    element.style.width = `${width}px`;
    element.style.height = `${Math.round(width * image.naturalHeight / image.naturalWidth)}px`;
  }
  place();
  showDifference();
}

function place() {
  const [width, height] = [stage.clientWidth, stage.clientHeight];
  view.scale = clamp(view.scale, 1, MOST_ZOOM);
  view.x = clamp(view.x, width * (1 - view.scale), 0);
  view.y = clamp(view.y, height * (1 - view.scale), 0);
  for (const element of [byId('left-image'), byId('right-image'), byId('canvas')]) {
    element.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
  }
  byId('left-layer').style.clipPath = `inset(0 ${100 - view.border}% 0 0)`;
  byId('handle').style.left = `${view.border}%`;
  byId('handle').setAttribute('aria-valuenow', Math.round(view.border));
  byId('handle').setAttribute('aria-valuetext', `${Math.round(view.border)} % ${view.left}, the rest ${view.right}`);
  byId('zoom').value = view.scale === 1 ? 'fit' : `${brief(view.scale, false, 2)}×`;
  stage.classList.toggle('zoomed', view.scale > 1);
}

/* Zoom so that the point (x, y) of the stage stays where it is; by default its middle. */
function zoom(factor, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  const scale = clamp(view.scale * factor, 1, MOST_ZOOM);
  view.x = x - (x - view.x) * scale / view.scale;
  view.y = y - (y - view.y) * scale / view.scale;
  view.scale = scale;
  place();
}

function moveBorder(percent) {
  view.border = clamp(percent, 0, 100);
  place();
}

function showDifference() {
  if (!view.difference) return;
  const images = [byId('left-image'), byId('right-image')];
  const width = Math.max(...images.map((image) => image.naturalWidth));
  const height = Math.max(...images.map((image) => image.naturalHeight));
  const [left, right] = images.map((image) => {
    const canvas = make('canvas', { width, height });
    const context = canvas.getContext('2d', { willReadFrequently: true });
    context.drawImage(image, 0, 0, width, height);
    return context.getImageData(0, 0, width, height).data;
  });
  const gain = 2 ** byId('gain').value;
  const shown = new ImageData(width, height);
  let sum = 0;
  let most = 0;
  for (let at = 0; at < left.length; at += 4) {
    for (let channel = at; channel < at + 3; channel += 1) {
      const apart = Math.abs(left[channel] - right[channel]);
      shown.data[channel] = gain * apart;
      sum += apart;
      most = Math.max(most, apart);
    }
    shown.data[at + 3] = 255;
  }
  const canvas = byId('canvas');
  Object.assign(canvas, { width, height });
  canvas.getContext('2d', { willReadFrequently: true }).putImageData(shown, 0, 0);
  canvas.setAttribute('aria-label', `Difference of ${view.left} and ${view.right}`);
  byId('gain-value').value = gain;
  byId('difference-text').textContent = `|${view.left} \u2212 ${view.right}| × ${gain}; mean ${brief(sum / (left.length * 0.75), false, 3)}, `
    + `largest ${most} of 255`;
}

function toggleDifference() {
  view.difference = !view.difference;
  byId('difference').setAttribute('aria-pressed', view.difference);
  byId('difference-panel').hidden = byId('gain-label').hidden = !view.difference;
  fitStage();
}

function swap() {
  [byId('left').value, byId('right').value] = [view.right, view.left];
  showSides();
}

/* The picture of this name, wherever a button with data-picture asks for it. */
function jump(name) {
  const found = data.pictures.findIndex((picture) => picture.name === name);
  if (found < 0) return;
  showPicture(found);
  byId('pictures').scrollIntoView();
  stage.focus({ preventScroll: true });
}

function onKey(event) {
  if (event.altKey || event.metaKey || event.ctrlKey) return;
  const step = event.shiftKey ? 10 : 2;
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const moves = way && view.scale > 1 && event.target === stage;
  if (moves) {
    view.x -= way[0] * 12 * step;
    view.y -= way[1] * 12 * step;
    place();
  } else if (way?.[0]) moveBorder(view.border + way[0] * step);
  else if (event.key === 'Home') moveBorder(0);
  else if (event.key === 'End') moveBorder(100);
  else if (event.key === '+' || event.key === '=') zoom(1.5);
  else if (event.key === '-') zoom(1 / 1.5);
  else if (event.key === '0') zoom(0);
  else if (event.key === '[') showPicture(view.picture - 1);
  else if (event.key === ']') showPicture(view.picture + 1);
  else if (event.key.toLowerCase() === 's') swap();
  else if (event.key.toLowerCase() === 'd') toggleDifference();
  else return;
  event.preventDefault();
}

/* One finger or button moves the border or, of a picture zoomed in, the picture; two fingers zoom. */
function watchPointers() {
  const down = new Map();
  let border = false, unmoved = view.border;
  const at = (event) => {
    const box = stage.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  stage.addEventListener('pointerdown', (event) => {
    if (event.button) return;
    down.set(event.pointerId, at(event));
    stage.setPointerCapture(event.pointerId);
    border = event.target === byId('handle') || view.scale === 1;
    (event.target === byId('handle') ? byId('handle') : stage).focus({ preventScroll: true });
    if (down.size > 1) moveBorder(unmoved); /* the first finger was one of two */
    else {
      unmoved = view.border;
      if (border) moveBorder(100 * at(event)[0] / stage.clientWidth);
    }
    event.preventDefault();
  });
  stage.addEventListener('pointermove', (event) => {
    const before = down.get(event.pointerId);
    if (!before) return;
    const now = at(event);
    if (down.size > 1) {
      const other = [...down].find(([id]) => id !== event.pointerId)[1];
      const apart = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
      zoom(apart(now) / Math.max(1, apart(before)), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else if (border) moveBorder(100 * now[0] / stage.clientWidth);
    else {
      view.x += now[0] - before[0];
      view.y += now[1] - before[1];
      place();
    }
    down.set(event.pointerId, now);
  });
  for (const end of ['pointerup', 'pointercancel']) stage.addEventListener(end, (event) => down.delete(event.pointerId));
  stage.addEventListener('wheel', (event) => {
    if (!event.ctrlKey && !stage.contains(document.activeElement)) return;
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 300), ...at(event));
  }, { passive: false });
}

if (data.pictures.length) {
  byId('pictures').hidden = false;
  options(byId('picture'), data.pictures.map((picture) => picture.name));
  byId('picture').addEventListener('change', () => showPicture(byId('picture').selectedIndex));
  byId('previous').addEventListener('click', () => showPicture(view.picture - 1));
  byId('next').addEventListener('click', () => showPicture(view.picture + 1));
  for (const side of ['left', 'right']) byId(side).addEventListener('change', showSides);
  byId('swap').addEventListener('click', swap);
  byId('in').addEventListener('click', () => zoom(1.5));
  byId('out').addEventListener('click', () => zoom(1 / 1.5));
  byId('fit').addEventListener('click', () => zoom(0));
  byId('pixels').addEventListener('click', () => {
    byId('pixels').setAttribute('aria-pressed', byId('stages').classList.toggle('pixels'));
  });
  byId('difference').addEventListener('click', toggleDifference);
  byId('gain').addEventListener('input', showDifference);
  stage.addEventListener('keydown', onKey);
  watchPointers();
  addEventListener('resize', fitStage);
  document.addEventListener('click', (event) => {
    const asked = event.target.closest('[data-picture]');
    if (asked) jump(asked.dataset.picture);
  });
  showPicture(0);
}
