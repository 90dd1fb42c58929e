"""How the evidence page looks and what it does in the browser: plain CSS and plain JavaScript."""

STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --paper: #fff; --ink: #1b2129;
  --soft: #5c6675; --rule: #dde2e9; --accent: #1f5fd0; --good: #1a7f4b; --bad: #b3261e;
  --unsure: #8a6d00; --track: #e6eaf0; --asked: #9aa6b8; --hint: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --ground: #12151b; --paper: #1a1f28; --ink: #e6e9ef;
  --soft: #9aa5b6; --rule: #2c3340; --accent: #7aa7ff; --good: #5fce97; --bad: #ff7d87;
  --unsure: #d8bb63; --track: #2a313d; --asked: #66748a; --hint: #3a3216; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { font-size: 1.5rem; margin: 0 0 8px; }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 0 0 8px; overflow-wrap: anywhere; }
.summary { color: var(--soft); }
form { position: sticky; top: 0; z-index: 3; background: var(--ground); padding: 10px 0;
  display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center;
  border-bottom: 1px solid var(--rule); }
form label { color: var(--soft); font-size: .86rem; }
input, select, button { font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--rule); border-radius: 6px; padding: 2px 8px; }
input[type=number] { width: 5.2em; }
button { cursor: pointer; } button:hover { border-color: var(--accent); }
article { background: var(--paper); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px 18px; margin: 16px 0; content-visibility: auto;
  contain-intrinsic-size: auto 420px; }
article[hidden] { display: none; }
header { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; }
.verdict { font-weight: 600; } .clean { color: var(--good); } .anomalous { color: var(--bad); }
.unjudged { color: var(--unsure); } .score, .facts { font-variant-numeric: tabular-nums; }
.prompt { color: var(--soft); }
.note { background: var(--hint); border-radius: 6px; padding: 6px 10px; }
.body { display: grid; grid-template-columns: minmax(0, 11fr) minmax(0, 10fr); gap: 18px;
  margin-top: 8px; }
@media (max-width: 760px) { .body { grid-template-columns: minmax(0, 1fr); } }
.stage { position: relative; line-height: 0; }
.stage video { width: 100%; height: auto; background: #000; border-radius: 6px;
  cursor: pointer; }
.stage.small video { image-rendering: pixelated; }
.stage canvas { position: absolute; left: 0; top: 0; pointer-events: none; }
.timeline { position: relative; margin: 8px 0 4px; cursor: pointer; padding: 2px 0; }
.row { position: relative; height: 12px; background: var(--track); border-radius: 3px;
  margin: 3px 0; }
.row i { position: absolute; top: 0; bottom: 0; min-width: 3px; border-radius: 3px; }
.row i.asked { background: var(--asked); }
.head { position: absolute; top: 0; bottom: 0; width: 2px; background: var(--ink); left: 0; }
.clock { display: flex; gap: 8px; align-items: center; color: var(--soft); font-size: .84rem;
  font-variant-numeric: tabular-nums; }
ol { list-style: none; margin: 0; padding: 0; }
ol li { border-left: 4px solid var(--rule); padding: 2px 0 2px 10px; margin: 0 0 10px; }
ol li.now { background: var(--ground); }
.why { margin: 2px 0 0; } .soft { color: var(--soft); font-size: .86rem; }
details { margin-top: 8px; } summary { cursor: pointer; color: var(--soft); font-size: .86rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--ground); padding: 8px;
  border-radius: 6px; font-size: .82rem; }
"""

SCRIPT = """
'use strict';
const number = value => value === '' ? null : Number(value);
const frameAt = (clip, seconds) =>
  // A hundredth of a frame: files store times as multiples of a tick, a little off.
  Math.min(clip.frames - 1, Math.max(0, Math.floor(seconds * clip.fps + 0.01)));

function boxesAt(finding, seconds) {
  if (!finding.boxes.length) return [[0, 0, 1, 1]];
  const away = box => Math.abs(box[0] - seconds);
  const nearest = Math.min(...finding.boxes.map(away));
  return finding.boxes.filter(box => away(box) <= nearest + 1e-6).map(box => box.slice(1));
}

function draw(canvas, video, clip, frame) {
  const wide = video.clientWidth, high = video.clientHeight, dense = window.devicePixelRatio || 1;
  canvas.width = Math.round(wide * dense); canvas.height = Math.round(high * dense);
  canvas.style.width = wide + 'px'; canvas.style.height = high + 'px';
  const pen = canvas.getContext('2d');
  pen.scale(dense, dense);
  pen.lineWidth = 3; pen.font = '600 12px system-ui, sans-serif'; pen.textBaseline = 'top';
  for (const finding of clip.findings) {
    if (frame < finding.first || frame >= finding.stop) continue;
    for (const [x1, y1, x2, y2] of boxesAt(finding, frame / clip.fps)) {
      // At the frame's edge half of the line would be outside.
      const left = Math.max(1.5, x1 * wide), top = Math.max(1.5, y1 * high);
      const right = Math.min(wide - 1.5, x2 * wide), bottom = Math.min(high - 1.5, y2 * high);
      pen.strokeStyle = finding.colour;
      pen.strokeRect(left, top, right - left, bottom - top);
      const room = pen.measureText(finding.type).width + 8;
      const x = Math.max(0, Math.min(left - 1.5, wide - room)), y = top >= 18 ? top - 17 : top + 2;
      pen.fillStyle = finding.colour; pen.fillRect(x, y, room, 16);
      pen.fillStyle = '#000'; pen.fillText(finding.type, x + 4, y + 2);
    }
  }
}

function showClip(article) {
  const clip = JSON.parse(article.dataset.clip);
  const video = article.querySelector('video'), canvas = article.querySelector('canvas');
  const head = article.querySelector('.head'), clock = article.querySelector('.now-at');
  const line = article.querySelector('.timeline'), items = [...article.querySelectorAll('ol li')];
  let frame = 0;
  function show(seconds) {
    frame = frameAt(clip, seconds);
    article.dataset.frame = frame;
    head.style.left = 100 * (frame + 0.5) / clip.frames + '%';
    clock.textContent = (frame / clip.fps).toFixed(2) + ' s, frame ' + frame;
    draw(canvas, video, clip, frame);
    items.forEach((item, row) => item.classList.toggle('now',
      frame >= clip.findings[row].first && frame < clip.findings[row].stop));
  }
  function seek(wanted) {
    video.pause();
    if (video.preload === 'none') video.preload = 'auto';
    const target = Math.min(clip.frames - 1, Math.max(0, wanted));
    // The middle of a frame is in it, however its ends are rounded.
    video.currentTime = (target + 0.5) / clip.fps;
  }
  if (video.requestVideoFrameCallback) {
    const tick = (_, shown) => {
      show(shown.mediaTime); video.requestVideoFrameCallback(tick);
    };
    video.requestVideoFrameCallback(tick);
  }
  // The browser's own controls would cover boxes at the bottom.
  video.controls = false;
  const play = () => { if (video.paused) video.play(); else video.pause(); };
  const button = article.querySelector('button[data-play]');
  button.addEventListener('click', play);
  video.addEventListener('click', play);
  for (const event of ['play', 'pause'])
    video.addEventListener(event, () => { button.textContent = video.paused ? 'play' : 'pause'; });
  for (const event of ['loadedmetadata', 'seeked', 'timeupdate', 'pause'])
    video.addEventListener(event, () => {
      if (event !== 'timeupdate' || !video.requestVideoFrameCallback) show(video.currentTime);
    });
  line.addEventListener('click', event => {
    const area = line.getBoundingClientRect();
    const bar = event.target.closest('i[data-frame]');
    seek(bar ? Number(bar.dataset.frame)
      : Math.floor((event.clientX - area.left) / area.width * clip.frames));
  });
  for (const button of article.querySelectorAll('button[data-frame]'))
    button.addEventListener('click', () => seek(Number(button.dataset.frame)));
  for (const button of article.querySelectorAll('button[data-step]'))
    button.addEventListener('click', () => seek(frame + Number(button.dataset.step)));
  video.addEventListener('error', () => {
    article.querySelector('.trouble').hidden = false;
  });
  new ResizeObserver(() => draw(canvas, video, clip, frame)).observe(video);
  show(0);
}

const articles = [...document.querySelectorAll('article')];
const form = document.querySelector('form'), list = document.querySelector('#clips');
function filter() {
  const low = number(form.low.value), high = number(form.high.value);
  const words = form.words.value.toLowerCase();
  let shown = 0;
  for (const article of articles) {
    const data = article.dataset, score = number(data.score);
    const keep = (!form.verdict.value || data.verdict === form.verdict.value)
      && (!form.type.value || JSON.parse(data.types).includes(form.type.value))
      && (low === null || (score !== null && score >= low))
      && (high === null || (score !== null && score <= high))
      && (!words || article.querySelector('.words').textContent.toLowerCase().includes(words));
    article.hidden = !keep;
    if (!keep) { const video = article.querySelector('video'); if (video) video.pause(); }
    shown += keep;
  }
  form.shown.value = shown + ' of ' + articles.length + ' clips';
}
function sort() {
  const sign = { worst: 1, best: -1 }[form.order.value];
  const rank = article => article.dataset.score === '' ? Infinity : sign * article.dataset.score;
  const order = sign ? [...articles].sort((a, b) => rank(a) - rank(b) || 0) : articles;
  list.append(...order);
}
form.addEventListener('submit', event => event.preventDefault());
form.addEventListener('input', filter);
form.order.addEventListener('input', sort);
form.addEventListener('reset', () => setTimeout(() => { filter(); sort(); }));
const near = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    showClip(entry.target);
    entry.target.querySelector('video').preload = 'auto';
  }
}, { rootMargin: '600px' });
articles.filter(one => one.dataset.clip).forEach(one => near.observe(one));
filter();
document.documentElement.dataset.ready = 'yes';
"""
