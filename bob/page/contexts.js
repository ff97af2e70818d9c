// Context x class, real beside generated: what marginalization does.
'use strict';

const contexts = {
  render(view) {
    const shown = report.metrics.synthetic.leakage;
    view.replaceChildren(h('div', { class: 'page' },
      h('h2', {}, 'Contexts by class'),
      h('p', {}, 'In a few real photos the context tells of the class: a bird that was photographed at the '
        + 'feeder is seen at the feeder. A classifier learns that. The generated images have their contexts '
        + 'drawn at random, whatever the class. Each row is a class, each column a context (phrases that mean '
        + 'much the same are one), and the darker, the more of the class’s images have it. Leakage is the '
        + 'adjusted mutual information of context and class: 1 where the one decides the other, 0 at chance.'),
      ...['background', 'pose'].flatMap((attribute) => [
        h('h3', {}, attribute),
        h('div', { class: 'pairs', id: `contexts-${attribute}` },
          this.matrix(attribute, 'real photos', 'shot', attribute, shown.real),
          this.matrix(attribute, 'generated, as asked', 'generated', attribute, shown.generated),
          shown.pictures
            ? this.matrix(attribute, 'generated, as the captioner sees them', 'generated',
              attribute === 'background' ? 'seenBackground' : 'seenPose', shown.pictures)
            : ''),
      ])));
  },

  matrix(attribute, title, kind, column, leakage) {
    const code = KINDS.indexOf(kind);
    const columns = this.columns(attribute);
    const place = new Map(columns.map(({ cluster }, c) => [cluster, c]));
    const cells = report.classes.map(() => columns.map(() => 0));
    const totals = report.classes.map(() => 0);
    for (let i = 0; i < entries.kind.length; i++) {
      const phrase = entries.kind[i] === code ? text(column, i) : null;
      if (phrase == null || !place.has(clusterOf(attribute, phrase))) continue;
      cells[entries.class[i]][place.get(clusterOf(attribute, phrase))]++;
      totals[entries.class[i]]++;
    }
    const side = Math.max(9, Math.min(22, 600 / report.classes.length));
    const left = 12 + 7.4 * Math.min(24, Math.max(...report.classes.map((name) => name.length)));
    const top = 10 + 5.2 * Math.min(26, Math.max(1, ...columns.map(({ label }) => label.length)));
    const width = left + side * columns.length + 100, height = top + side * report.classes.length + 4;
    const rows = report.classes.flatMap((name, row) => [
      h('svg:text', { x: left - 6, y: top + side * (row + 0.5) + 4, 'text-anchor': 'end', 'font-size': Math.min(12, side) },
        short(name, 24), h('svg:title', {}, name)),
      ...columns.map(({ phrases, label }, c) => {
        const cell = h('svg:rect', {
          x: left + side * c, y: top + side * row, width: side - 1, height: side - 1, class: 'hit',
          click: () => gallery.go({ kind: [kind], class: [name], ...(column === attribute && { [attribute]: phrases }) }),
        }, h('svg:title', {}, `${name}, ${label}: ${cells[row][c]} of ${totals[row]}`));
        cell.style.fill = `rgb(var(--cell) / ${totals[row] ? 0.06 + 0.94 * cells[row][c] / totals[row] : 0.06})`;
        return cell;
      }),
    ]);
    const heads = columns.map(({ label, phrases }, c) => h('svg:text', {
      transform: `translate(${left + side * (c + 0.6)} ${top - 6}) rotate(-45)`,
    }, short(label, 26), h('svg:title', {}, phrases.join(', '))));
    return h('figure', { class: 'matrix' },
      h('figcaption', {}, `${title}: leakage `, h('b', {}, number(leakage[attribute]))),
      h('svg:svg', { width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `${attribute}, ${title}` }, heads, rows));
  },

  /** The clusters that any image has, most frequent first, each named by its most frequent phrase. */
  columns(attribute) {
    const seen = attribute === 'background' ? 'seenBackground' : 'seenPose';
    const counts = new Map();
    for (let i = 0; i < entries.kind.length; i++) {
      if (entries.kind[i] > SHOT) continue;
      for (const column of [attribute, seen]) {
        const phrase = text(column, i);
        if (phrase != null) counts.set(phrase, (counts.get(phrase) ?? 0) + 1);
      }
    }
    const clusters = new Map();
    for (const [phrase, n] of [...counts].sort((a, b) => b[1] - a[1])) {
      const cluster = clusterOf(attribute, phrase);
      const column = clusters.get(cluster) ?? { cluster, label: phrase, phrases: [], n: 0 };
      column.phrases.push(phrase);
      column.n += n;
      clusters.set(cluster, column);
    }
    return [...clusters.values()].sort((a, b) => b.n - a.n);
  },
};

const short = (name, length) => name.length > length ? `${name.slice(0, length - 1)}…` : name;
