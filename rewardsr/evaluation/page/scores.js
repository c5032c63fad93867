/* The table of every image: of one system, what a metric gives or changes, sorted by any column. */
const order = { column: 1, descending: false };

function columns() {
  const system = data.systems[byId('system').selectedIndex];
  const quantity = byId('quantity').value;
  const values = system.metrics.map(([, base, tuned]) => (
    quantity === 'base' ? base : quantity === 'tuned' ? tuned : tuned.map((score, at) => score - base[at])
  ));
  return { system, quantity, values };
}

function sorted({ system, values }) {
  const places = system.images.map((_, at) => at);
  const names = new Intl.Collator(undefined, { numeric: true });
  places.sort((a, b) => (
    order.column === 0 ? names.compare(system.images[a], system.images[b]) : values[order.column - 1][a] - values[order.column - 1][b]
  ));
  return order.descending ? places.reverse() : places;
}

function showScores() {
  const found = columns();
  const { system, quantity, values } = found;
  const heads = ['image', ...system.metrics.map(([name]) => name)].map((name, column) => {
    const chosen = column === order.column;
    const mark = chosen ? (order.descending ? ' ▼' : ' ▲') : '';
    const button = make('button', { type: 'button' }, name, make('span', { 'aria-hidden': 'true' }, mark));
    button.addEventListener('click', () => {
      order.descending = order.column === column && !order.descending;
      order.column = column;
      showScores();
      byId('table').tHead.rows[0].cells[column].firstChild.focus();
    });
    return make('th', { scope: 'col', 'aria-sort': chosen ? (order.descending ? 'descending' : 'ascending') : 'none' }, button);
  });
  byId('table').tHead.replaceChildren(make('tr', {}, ...heads));
  const pictured = new Set(data.pictures.map((picture) => picture.name));
  byId('table').tBodies[0].replaceChildren(...sorted(found).map((at) => {
    const name = system.images[at];
    const first = make('th', { scope: 'row' }, name);
    if (pictured.has(name)) {
      const button = make('button', { type: 'button', className: 'link' }, name);
      button.dataset.picture = name;
      first.replaceChildren(button);
    }
    const cells = values.map((column) => {
      const kind = quantity !== 'change' || column[at] === 0 ? '' : column[at] > 0 ? 'up value' : 'down value';
      return make('td', { className: kind }, brief(column[at], quantity === 'change'));
    });
    return make('tr', {}, first, ...cells);
  }));
}

/* The worst change of the metric that counts most comes first. */
function showSystem() {
  const system = data.systems[byId('system').selectedIndex];
  order.column = 1 + Math.max(0, system.metrics.findIndex(([name]) => name === system.lead));
  order.descending = false;
  showScores();
}

if (data.systems.length) {
  byId('images').hidden = false;
  options(byId('system'), data.systems.map((system) => system.name));
  byId('system').addEventListener('change', showSystem);
  byId('quantity').addEventListener('change', showScores);
  showSystem();
}
