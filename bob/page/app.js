// The tabs, the keyboard, and the tab that tries the classifier on a photo.
'use strict';

const tryOut = {
  render(view) {
    const input = h('input', { type: 'file', accept: 'image/*', hidden: true, change: () => this.send(input.files[0]) });
    const drop = h('div', {
      class: 'drop', dragover: (event) => { event.preventDefault(); drop.classList.add('over'); },
      dragleave: () => drop.classList.remove('over'),
      drop: (event) => { event.preventDefault(); drop.classList.remove('over'); this.send(event.dataTransfer.files[0]); },
    }, 'Drop a photo here, or ', h('button', { click: () => input.click() }, 'choose one'), input);
    this.answer = h('div', { id: 'answer' });
    view.replaceChildren(h('div', { class: 'page' }, h('h2', {}, 'Try the exported classifier'), drop, this.answer));
  },

  async send(file) {
    if (!file) return;
    this.answer.replaceChildren(h('p', { class: 'faint' }, '…'));
    try {
      const { top, shots } = await post('try', file, 'application/octet-stream');
      const photo = h('img', { class: 'tried', alt: '', src: URL.createObjectURL(file) });
      const place = new Map(entries.file.map((name, i) => [name, i]));
      this.answer.replaceChildren(
        h('h3', {}, file.name), photo, bars(top.map(({ class: name, probability }, n) => [name, probability, n === 0])),
        h('h3', {}, 'The shots most like it'),
        h('div', { class: 'shots' }, shots.map(({ file: shot, class: name, similarity }) => h('figure', {},
          place.has(shot) ? picture(place.get(shot)) : '', h('figcaption', {}, `${name}, similarity ${number(similarity)}`)))));
    } catch (error) {
      this.answer.replaceChildren(h('p', { role: 'alert' }, error.message));
    }
  },
};

const TABS = { gallery: ['Gallery', gallery], contexts: ['Contexts', contexts], results: ['Results', results], try: ['Try', tryOut] };
let shown = null;

function show(name) {
  shown = name in TABS && (name !== 'try' || decisions.served) ? name : 'gallery';
  if (location.hash.slice(1) !== shown) history.replaceState(null, '', `#${shown}`);
  document.getElementById('tabs').replaceChildren(...Object.entries(TABS)
    .filter(([tab]) => tab !== 'try' || decisions.served)
    .map(([tab, [label]]) => h('button', { role: 'tab', 'aria-selected': String(tab === shown), click: () => show(tab) }, label)));
  TABS[shown][1].render(document.getElementById('view'));
}

function showHelp() {
  const keys = [['← → ↑ ↓', 'another image'], ['Enter', 'one image in full, and back'], ['Esc', 'close it']];
  if (decisions.served) {
    keys.push(['x', 'reject, and on to the next'], ['k', 'keep, and on to the next'],
      ['Shift+x, Shift+k', 'all that are shown'], ['u', 'undo']);
  }
  const dialog = document.getElementById('help');
  dialog.replaceChildren(h('h2', {}, 'Keys'), h('table', {}, keys.map(([key, what]) =>
    h('tr', {}, h('td', {}, h('kbd', {}, key)), h('td', {}, what)))),
  decisions.served ? '' : h('p', {}, '`bob look` serves this page so that images can be rejected and captions corrected.'),
  h('button', { click: () => dialog.close() }, 'Close'));
  dialog.showModal();
}

document.addEventListener('keydown', (event) => {
  const typing = event.target.closest('input:not([type="checkbox"]), select, dialog');
  if (shown === 'gallery' && !typing && gallery.key(event)) event.preventDefault();
});
window.addEventListener('hashchange', () => { if (location.hash.slice(1) !== shown) show(location.hash.slice(1)); });
window.addEventListener('beforeunload', (event) => { if (decisions.any && decisions.busy) event.preventDefault(); });

decisions.begin().finally(() => { show(location.hash.slice(1) || 'gallery'); decisions.draw(); });
