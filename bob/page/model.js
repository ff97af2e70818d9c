// The report's data, and how an element is made. Texts come from class names, prompts and files,
// which are anybody's: they become text nodes and attributes, never HTML.
'use strict';

const report = JSON.parse(document.getElementById('report').textContent);
const entries = report.entries;
const KINDS = ['generated', 'shot', 'validation', 'test', 'rejected'];
const GENERATED = 0, SHOT = 1, REJECTED = 4;

/** An element, or an SVG element by `svg:name`, with attributes, listeners (functions) and children. */
function h(tag, attributes = {}, ...children) {
  const svg = tag.startsWith('svg:');
  const element = svg
    ? document.createElementNS('http://www.w3.org/2000/svg', tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

const number = (value, digits = 2) => value == null ? '–' : value.toFixed(digits).replace(/^-(0\.?0*)$/, '$1');
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const count = (n, one, many = `${one}s`) => `${n.toLocaleString('en')} ${n === 1 ? one : many}`;

/** What stands in a column of texts for an entry, or null. */
function text(column, i) {
  const place = entries[column][i];
  return place < 0 ? null : report.texts[column][place];
}
const className = (i) => report.classes[entries.class[i]];
/** Its three most probable classes: [class, probability], most probable first. */
const says = (i) => entries.says[i] ?? [];
/** 1 - the probability of its own class. */
const doubt = (i) => entries.doubt[i];
const thumbnail = (i) => entries.image?.[i] ?? `thumbs/${String(i).padStart(6, '0')}.webp`;
/** The image in full, beside the report; a report that stands alone has thumbnails only. */
const original = (i) => entries.image?.[i]
  ?? `../${entries.file[i].split('/').slice(1).map(encodeURIComponent).join('/')}`;

/** 'as asked' where the captioner saw the context that the prompt asked for. */
function obedience(i) {
  if (entries.kind[i] !== GENERATED || entries.background[i] < 0) return null;
  if (entries.seenBackground[i] < 0) return 'not looked at';
  const differs = ['background', 'pose'].filter((attribute) => !obeys(attribute, i));
  return differs.length === 2 ? 'both differ' : differs.length ? `${differs[0]} differs` : 'as asked';
}
function obeys(attribute, i) {
  const seen = attribute === 'background' ? 'seenBackground' : 'seenPose';
  return clusterOf(attribute, text(attribute, i)) === clusterOf(attribute, text(seen, i));
}
/** Phrases of one cluster count as one context; a phrase that the audit did not see, as itself. */
function clusterOf(attribute, phrase) {
  const clusters = report.clusters[attribute];
  return Object.hasOwn(clusters, phrase) ? clusters[phrase] : phrase;
}
