// Accuracy and lift, classes, confusions, learning curves and the exported file's speed.
'use strict';

const VARIANTS = { real_only: ['real only', '--real'], real_and_synthetic: ['real and synthetic', '--synthetic'] };

const results = {
  render(view) {
    const { accuracy, onnx } = report.metrics;
    const spread = (value) => report.seeds.real_only.length > 1 ? `± ${number(value)}` : 'one seed';
    const tile = (title, value, note) => h('div', { class: 'tile' }, title, h('b', {}, value), h('span', { class: 'faint' }, note));
    const seeds = (variant) => report.seeds[variant].map(([, top1]) => number(top1, 1)).join(', ');
    view.replaceChildren(h('div', { class: 'page' },
      h('h2', {}, `Top-1 on ${report.test.toLocaleString('en')} test photos`),
      h('div', { class: 'tiles' },
        ...Object.entries(VARIANTS).map(([variant, [name]]) => tile(name, `${number(accuracy[variant].top1)} %`,
          `${spread(accuracy[variant].top1_std)}; by seed ${seeds(variant)}`)),
        tile('lift', `${accuracy.lift > 0 ? '+' : ''}${number(accuracy.lift)} points`, spread(accuracy.lift_std)),
        tile('generated', report.metrics.synthetic.images.toLocaleString('en'), 'images')),
      h('div', { class: 'columns' },
        h('section', {}, h('h2', {}, 'By class'), key(), this.classes()),
        h('section', {}, h('h2', {}, 'Most often confused'), this.confusions()),
        h('section', {}, h('h2', {}, 'Accuracy against the variety of the shots'), key(), this.variety(),
          h('p', { class: 'faint' }, 'A point is a class: how many different contexts its real training photos have.')),
        h('section', {}, h('h2', {}, 'Learning curves, validation'), key(), this.curves()),
        h('section', {}, h('h2', {}, 'Speed of the exported classifier'), this.latency(onnx)))));
  },

  classes() {
    const rows = report.classes.map((name, c) => ({
      name, c, real: report.by_class.real_only[c], both: report.by_class.real_and_synthetic[c],
    })).filter(({ both }) => both != null).sort((a, b) => (b.both - b.real) - (a.both - a.real));
    const left = 190, width = 330, row = 22;
    const x = (value) => left + width * value / 100;
    const size = [left + width + 60, rows.length * row + 24];
    return h('svg:svg', { width: size[0], height: size[1], viewBox: `0 0 ${size.join(' ')}`, role: 'img', 'aria-label': 'top-1 by class' },
      [0, 25, 50, 75, 100].map((tick) => [
        h('svg:line', { class: 'axis', x1: x(tick), x2: x(tick), y1: 0, y2: rows.length * row }),
        h('svg:text', { class: 'faint', x: x(tick), y: rows.length * row + 16, 'text-anchor': 'middle' }, String(tick)),
      ]).flat(),
      rows.map(({ name, real, both }, r) => {
        const y = r * row + row / 2;
        return [
          h('svg:text', { x: left - 8, y: y + 4, 'text-anchor': 'end', class: 'hit', click: () => gallery.go({ kind: ['test'], class: [name] }) }, short(name, 24)),
          h('svg:line', { class: 'axis', x1: x(real), x2: x(both), y1: y, y2: y, 'stroke-width': 3 }),
          dot(x(real), y, '--real', `${name}, real only: ${number(real)} %`),
          dot(x(both), y, '--synthetic', `${name}, real and synthetic: ${number(both)} %`),
          h('svg:text', { x: left + width + 10, y: y + 4 }, `${both >= real ? '+' : ''}${number(both - real, 1)}`),
        ];
      }).flat());
  },

  confusions() {
    if (!report.confusions.length) return h('p', {}, 'None: every test photo was named right.');
    return h('table', {}, h('tr', {}, h('th', {}, 'shown'), h('th', {}, 'named'),
      h('th', { class: 'number' }, 'photos'), h('th', { class: 'number' }, 'of real only'), h('th')),
    report.confusions.slice(0, 20).map(([actual, named, both, real]) => {
      const [shown, called] = [report.classes[actual], report.classes[named]];
      return h('tr', {}, h('td', {}, shown), h('td', {}, called), h('td', { class: 'number' }, String(both)),
        h('td', { class: 'number faint' }, String(real)),
        h('td', {}, h('button', { click: () => gallery.go({ kind: ['test'], class: [shown], says: [called] }) }, 'look')));
    }));
  },

  variety() {
    const places = new Map();
    for (let i = 0; i < entries.kind.length; i++) {
      if (entries.kind[i] !== SHOT || entries.background[i] < 0) continue;
      const pair = ['background', 'pose'].map((a) => clusterOf(a, text(a, i))).join('\n');
      const seen = places.get(entries.class[i]) ?? new Set();
      places.set(entries.class[i], seen.add(pair));
    }
    const points = Object.entries(VARIANTS).flatMap(([variant, [name, colour]]) => [...places].map(([c, seen]) => ({
      x: seen.size, y: report.by_class[variant][c], colour, title: `${report.classes[c]}, ${name}: ${number(report.by_class[variant][c])} %, ${count(seen.size, 'context')}`,
    }))).filter(({ y }) => y != null);
    if (!points.length) return h('p', {}, 'The shots have no contexts.');
    return plot(points, { x: 'different contexts among its shots', y: 'top-1, %', whole: true });
  },

  curves() {
    const points = Object.entries(VARIANTS).flatMap(([variant, [, colour]]) =>
      (report.curves[variant] ?? []).map(([x, y]) => ({ x, y, colour, line: variant })));
    if (!points.length) return h('p', {}, 'There are no validation photos.');
    return plot(points, { x: 'epoch', y: 'top-1, %' });
  },

  latency(onnx) {
    const batches = (of) => Object.keys(of).filter((name) => name.startsWith('batch_'))
      .sort((a, b) => a.slice(6) - b.slice(6));
    const rows = [];
    const add = (name, of, prefix, top1, size) => batches(of).forEach((batch, n) => rows.push(h('tr', {},
      h('td', {}, n ? '' : name), h('td', { class: 'number' }, n ? '' : number(top1)),
      h('td', { class: 'number' }, n || size == null ? '' : number(size)),
      h('td', { class: 'number' }, batch.slice(6)),
      h('td', { class: 'number' }, number(of[batch][`${prefix}p50_ms`], 1)),
      h('td', { class: 'number' }, number(of[batch][`${prefix}images_per_second`], 0)))));
    add('ONNX, fp32', onnx, '', onnx.top1, onnx.model_mb);
    for (const [name, of] of Object.entries(onnx)) {
      if (of && typeof of === 'object' && batches(of).length) add(`ONNX, ${name}`, of, '', of.top1, of.model_mb);
      else if (of?.survived === false) rows.push(h('tr', {}, h('td', { colspan: 6 }, `ONNX, ${name}: this network does not survive it`)));
    }
    add('torch', onnx, 'torch_', onnx.torch_top1, null);
    return h('div', {}, h('table', {}, h('tr', {}, ['runtime', 'top-1, %', 'MB', 'batch', 'median, ms', 'images/s']
      .map((name, n) => h('th', { class: n ? 'number' : '' }, name))), rows),
    h('p', { class: 'faint' }, `${onnx.provider} on ${onnx.gpu === 'none' ? onnx.processor : onnx.gpu}, ${count(onnx.threads, 'thread')}; ${onnx.model_mb} MB`));
  },
};

const key = () => h('div', { class: 'key' }, ...Object.values(VARIANTS).flatMap(([name, colour]) => {
  const mark = h('i');
  mark.style.background = `var(${colour})`;
  return [mark, name];
}));

function dot(x, y, colour, title) {
  const mark = h('svg:circle', { cx: x, cy: y, r: 5 }, h('svg:title', {}, title));
  mark.style.fill = `var(${colour})`;
  return mark;
}

/** A plot of points {x, y, colour, title?, line?}; those of one `line` are joined. */
function plot(points, { x: xLabel, y: yLabel, whole = false }) {
  const width = 460, height = 240, left = 44, bottom = 38;
  const xs = points.map(({ x }) => x), ys = points.map(({ y }) => y);
  const low = Math.floor(Math.min(...ys) / 10) * 10, high = Math.max(low + 10, Math.ceil(Math.max(...ys) / 10) * 10);
  const first = Math.min(...xs) - (whole ? 0.5 : 0), last = Math.max(...xs) + (whole ? 0.5 : 0);
  const x = (value) => left + (width - left - 14) * (last > first ? (value - first) / (last - first) : 0.5);
  const y = (value) => 8 + (height - bottom - 8) * (high - value) / (high - low);
  const yTicks = [0, 0.25, 0.5, 0.75, 1].map((share) => low + share * (high - low));
  const xTicks = whole ? [...new Set(xs)].sort((a, b) => a - b)
    : [...new Set([0, 0.25, 0.5, 0.75, 1].map((share) => Math.round(first + share * (last - first))))];
  const lines = [...new Set(points.map(({ line }) => line).filter(Boolean))].map((line) => {
    const own = points.filter((point) => point.line === line);
    const path = h('svg:polyline', { fill: 'none', 'stroke-width': 2, points: own.map((p) => `${x(p.x)},${y(p.y)}`).join(' ') });
    path.style.stroke = `var(${own[0].colour})`;
    return path;
  });
  return h('svg:svg', { width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `${yLabel} against ${xLabel}` },
    yTicks.flatMap((tick) => [
      h('svg:line', { class: 'axis', x1: left, x2: width - 14, y1: y(tick), y2: y(tick) }),
      h('svg:text', { class: 'faint', x: left - 6, y: y(tick) + 4, 'text-anchor': 'end' }, number(tick, tick % 1 ? 1 : 0)),
    ]),
    xTicks.map((tick) => h('svg:text', { class: 'faint', x: x(tick), y: height - bottom + 18, 'text-anchor': 'middle' }, String(tick))),
    h('svg:text', { class: 'faint', x: (left + width) / 2, y: height - 4, 'text-anchor': 'middle' }, xLabel),
    lines,
    points.filter(({ line }) => !line).map((point) => dot(x(point.x), y(point.y), point.colour, point.title)));
}
