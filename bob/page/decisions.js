// Verdicts on generated images and corrected captions, where `bob look` serves the page. They are
// pending until they are saved; the server says before what they cost.
'use strict';

const decisions = {
  served: false,
  state: { verdicts: report.verdicts, rejected: [], captions: { edits: {} }, file: '' },
  pending: { verdicts: new Map(), captions: new Map() },
  history: [], // steps, each a list of [which, key, what it was before or undefined]
  costs: [],
  error: '',
  saved: '',

  /** Ask whether somebody serves this page; from a disk or a plain web server nobody answers. */
  async begin() {
    if (!location.protocol.startsWith('http')) return;
    try {
      const answer = await fetch('../../api/state');
      if (!answer.ok) return;
      this.state = await answer.json();
    } catch { return; }
    this.served = true;
    for (const { recipe, class: name, file, image } of this.state.rejected) addRejected(recipe, name, file, image);
    this.restore();
    setInterval(() => { if (!document.hidden) this.poll(); }, 4000);
  },

  async poll() {
    try {
      const answer = await fetch('../../api/state');
      if (!answer.ok) throw new Error(await problem(answer));
      this.take(await answer.json());
      if (this.lost) { this.lost = false; this.draw(); }
    } catch (error) {
      this.lost = true;
      this.error = `bob look does not answer (${error.message}); what is pending stays here`;
      this.draw();
    }
  },

  take(state) {
    const before = JSON.stringify([this.state.verdicts, this.state.captions]);
    const anew = state.version !== this.state.version;
    this.state = { ...state, version: this.state.version };
    this.anew ||= anew;
    if (before !== JSON.stringify([state.verdicts, state.captions])) gallery.decided();
    if (anew) this.draw();
  },

  verdict(i) {
    const key = entries.key[i];
    if (this.pending.verdicts.has(key)) return this.pending.verdicts.get(key);
    return this.state.verdicts[key] ?? null;
  },

  /** Give these entries a verdict (null: take it back), as one step that can be undone. */
  decide(which, verdict) {
    const step = [];
    for (const i of which) {
      if (entries.kind[i] !== GENERATED && entries.kind[i] !== REJECTED) continue;
      if (this.verdict(i) === verdict) continue;
      step.push(this.change('verdicts', entries.key[i], verdict));
    }
    if (step.length) this.changed(step);
  },

  change(which, key, value) {
    const pending = this.pending[which];
    const step = [which, key, pending.get(key)];
    const saved = which === 'verdicts' ? this.state.verdicts[key] ?? null : undefined;
    if (value === undefined || value === saved) pending.delete(key);
    else pending.set(key, value);
    return step;
  },

  changed(step) {
    if (step) this.history.push(step);
    this.error = this.saved = '';
    this.keep();
    gallery.decided();
    this.draw();
    this.ask();
  },

  undo() {
    const step = this.history.pop();
    if (!step) return;
    for (const [which, key, before] of step.reverse()) {
      if (before === undefined) this.pending[which].delete(key);
      else this.pending[which].set(key, before);
    }
    this.changed();
  },

  body() {
    return JSON.stringify({
      verdicts: Object.fromEntries(this.pending.verdicts), captions: Object.fromEntries(this.pending.captions),
    });
  },
  get any() { return this.pending.verdicts.size + this.pending.captions.size > 0; },

  /** What is pending survives a reload, and a server that was killed. */
  keep() {
    localStorage.setItem(`bob ${this.state.file}`, this.any ? this.body() : '');
  },
  restore() {
    const kept = localStorage.getItem(`bob ${this.state.file}`);
    if (!kept) return;
    const { verdicts, captions } = JSON.parse(kept);
    const known = new Set(entries.key);
    for (const [key, verdict] of Object.entries(verdicts)) if (known.has(key)) this.change('verdicts', key, verdict);
    for (const [key, caption] of Object.entries(captions)) if (known.has(key)) this.change('captions', key, caption);
    this.draw();
    this.ask();
  },

  /** Ask what the pending decisions cost, once a burst of them is over. */
  ask() {
    clearTimeout(this.timer);
    this.costs = [];
    if (!this.any) return;
    this.timer = setTimeout(async () => {
      const body = this.body();
      try {
        const answer = await post('cost', body);
        if (body === this.body()) { this.costs = answer.lines; this.draw(); }
      } catch (error) {
        if (body === this.body()) { this.error = error.message; this.draw(); }
      }
    }, 250);
  },

  async save() {
    const body = this.body();
    const sent = JSON.parse(body);
    this.busy = true;
    this.draw();
    try {
      const answer = await post('save', body);
      // What was decided while the answer was on its way stays pending.
      for (const which of ['verdicts', 'captions']) {
        for (const [key, value] of Object.entries(sent[which])) {
          if (JSON.stringify(this.pending[which].get(key) ?? null) === JSON.stringify(value)) this.pending[which].delete(key);
        }
      }
      this.history = [];
      this.costs = [];
      this.saved = `Saved in ${answer.files.join(' and ')}. \`dvc repro\` makes what follows from it.`;
      this.error = '';
      this.take(answer.state);
      this.keep();
      gallery.decided();
    } catch (error) {
      this.error = error.message;
    }
    this.busy = false;
    this.draw();
  },

  discard() {
    const all = ['verdicts', 'captions'].flatMap((which) => [...this.pending[which].keys()].map((key) => this.change(which, key, undefined)));
    this.changed(all);
  },

  draw() {
    const footer = document.getElementById('decisions');
    footer.hidden = !this.served || !(this.any || this.error || this.saved || this.anew);
    const { verdicts, captions } = this.pending;
    const of = (verdict) => [...verdicts.values()].filter((v) => v === verdict).length;
    const parts = [[of('reject'), 'rejected'], [of('keep'), 'kept'], [of(null), 'taken back'],
      [captions.size, captions.size === 1 ? 'caption' : 'captions']].filter(([n]) => n).map(([n, what]) => `${n} ${what}`);
    footer.replaceChildren(
      h('div', { class: 'row' },
        this.any ? h('b', { id: 'pending' }, parts.join(', ')) : '',
        this.any ? h('button', { class: 'primary', disabled: Boolean(this.busy), click: () => this.save() }, 'Save') : '',
        this.history.length ? h('button', { click: () => this.undo() }, 'Undo') : '',
        this.any ? h('button', { click: () => this.discard() }, 'Discard') : '',
        this.saved ? h('span', { id: 'saved' }, this.saved) : '',
        this.error ? h('span', { class: 'error', role: 'alert' }, this.error) : '',
        this.anew ? h('span', {}, 'The report was made again. ', h('button', { click: () => location.reload() }, 'Reload')) : ''),
      this.costs.length ? h('ul', { id: 'costs' }, this.costs.map((line) => h('li', {}, line))) : '');
  },

  // --- what other parts of the page show ---

  groupButtons(shown) {
    const open = shown.filter((i) => entries.kind[i] === GENERATED);
    if (!this.served || !open.length) return [];
    return [
      h('button', { id: 'reject-all', click: () => this.decide(open, 'reject') }, `Reject all ${open.length.toLocaleString('en')}`),
      h('button', { id: 'keep-all', click: () => this.decide(open, 'keep') }, 'Keep all'),
    ];
  },

  verdictButtons(i) {
    if (!this.served || (entries.kind[i] !== GENERATED && entries.kind[i] !== REJECTED)) return [];
    const button = (verdict, name, key) => h('button', {
      class: verdict, 'aria-pressed': String(this.verdict(i) === verdict),
      click: () => this.decide([i], this.verdict(i) === verdict ? null : verdict),
    }, `${name} `, h('kbd', {}, key));
    return [h('div', { class: 'verdicts' }, button('reject', 'Reject', 'x'), button('keep', 'Keep', 'k'))];
  },

  /** Of a real photo: its background and pose, to be corrected in place. */
  captionForm(i) {
    if (!this.served || entries.kind[i] !== SHOT) return [];
    const key = entries.key[i];
    const bank = { background: text('background', i) ?? '', pose: text('pose', i) ?? '' };
    const saved = this.state.captions.edits[key] ?? bank;
    const now = this.pending.captions.get(key) ?? saved;
    const change = (attribute) => (event) => {
      const value = { ...(this.pending.captions.get(key) ?? saved), [attribute]: event.target.value.trim() };
      const same = value.background === saved.background && value.pose === saved.pose;
      this.changed([this.change('captions', key, same ? undefined : value)]);
    };
    return [
      h('h3', {}, 'Caption'),
      h('div', { class: 'caption' }, ['background', 'pose'].flatMap((attribute) => [
        h('label', { for: `caption-${attribute}` }, attribute),
        h('input', { id: `caption-${attribute}`, value: now[attribute], change: change(attribute) }),
      ])),
    ];
  },

  key(event) {
    if (!this.served) return false;
    const i = gallery.shown[gallery.at];
    const verdicts = { x: 'reject', k: 'keep' };
    const pressed = event.key.toLowerCase();
    if (pressed === 'u' || (pressed === 'z' && (event.ctrlKey || event.metaKey))) this.undo();
    else if (event.ctrlKey || event.metaKey || event.altKey) return false;
    else if (pressed in verdicts && event.shiftKey) this.decide(gallery.shown, verdicts[pressed]);
    else if (pressed in verdicts && i !== undefined) {
      const verdict = verdicts[pressed];
      this.decide([i], this.verdict(i) === verdict ? null : verdict);
      gallery.select(gallery.at + 1, true); // on to the next, as one goes through many
    } else return false;
    return true;
  },
};

/** An image that was rejected and is no longer among the generated ones, so that it can be taken back. */
function addRejected(recipe, name, file, image) {
  if (!report.classes.includes(name)) return;
  const row = {
    kind: REJECTED, class: report.classes.indexOf(name), key: recipe, file, image: image ?? 'data:,',
    says: null, doubt: null, shot: -1, similarity: null, alike: [],
  };
  entries.image ??= new Array(entries.kind.length).fill(null);
  for (const column of Object.keys(entries)) entries[column].push(column in row ? row[column] : column in report.texts ? -1 : null);
}

async function post(call, body, type = 'application/json') {
  const answer = await fetch(`../../api/${call}`, { method: 'POST', body, headers: { 'Content-Type': type } });
  if (!answer.ok) throw new Error(await problem(answer));
  return answer.json();
}
async function problem(answer) {
  try { return (await answer.json()).error; } catch { return `status ${answer.status}`; }
}
