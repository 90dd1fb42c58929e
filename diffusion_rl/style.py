"""How the report looks, in light and in dark."""

STYLE = """
:root { color-scheme: light dark;
  --ground: #f7f8fa; --paper: #ffffff; --ink: #1c2330; --soft: #5d6778; --rule: #e1e5eb;
  --accent: #1f5fd0; --good: #1a7f4b; --bad: #c3283a; --shade: 0 1px 3px rgb(20 30 50 / 8%);
  --series-0: #1f5fd0; --series-1: #e0782b; --series-2: #1a8f6f; --series-3: #a0419e;
  --series-4: #8a6d1d; --series-5: #5d6778; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #12151b; --paper: #1a1f28; --ink: #e6e9ef; --soft: #9aa5b6; --rule: #2c3340;
  --accent: #7aa7ff; --good: #5fce97; --bad: #ff7d87; --shade: none;
  --series-0: #7aa7ff; --series-1: #f3a261; --series-2: #54c7a4; --series-3: #d78ad5;
  --series-4: #d8bb63; --series-5: #9aa5b6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 28px; }
h2 { font-size: 1.2rem; letter-spacing: -0.005em; margin: 48px 0 12px; }
h3 { font-size: 0.95rem; font-weight: 600; margin: 0 0 12px; overflow-wrap: anywhere; }
p { max-width: 72ch; margin: 0 0 12px; }
.lead { font-size: 1.12rem; color: var(--soft); margin: -12px 0 28px; }
section section { margin-bottom: 20px; }
.caption, .note { color: var(--soft); font-size: 0.88rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 14px; }
.card { background: var(--paper); border: 1px solid var(--rule); border-radius: 12px;
  padding: 16px 18px; box-shadow: var(--shade); display: flex; flex-direction: column; gap: 2px; }
.card.effect { border-color: var(--accent); }
.card .label { color: var(--soft); font-size: 0.82rem; }
.card .number { font-size: 1.8rem; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.card.effect .number { color: var(--accent); }
.card .detail { color: var(--soft); font-size: 0.82rem; font-variant-numeric: tabular-nums; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 32px; margin: 22px 0 0; }
.facts div { display: flex; gap: 8px; font-size: 0.88rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--rule);
  border-radius: 12px; box-shadow: var(--shade); }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 10px 16px; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 550; }
thead th { color: var(--soft); font-weight: 500; font-size: 0.82rem; }
tbody tr { border-top: 1px solid var(--rule); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr));
  gap: 16px; }
figure { margin: 0; }
.chart, .pair { background: var(--paper); border: 1px solid var(--rule); border-radius: 12px;
  padding: 18px; box-shadow: var(--shade); }
.chart figcaption { font-weight: 600; font-size: 0.95rem; margin-bottom: 4px; }
.chart svg { display: block; width: 100%; height: auto; font-size: 13px; }
.chart text { fill: var(--soft); } .chart .grid { stroke: var(--rule); }
.chart .curve, .chart .raw { fill: none; stroke-width: 2.2; stroke-linejoin: round;
  stroke-linecap: round; }
.chart .raw { stroke-width: 1; opacity: 0.35; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 0.85rem; margin: 4px 0 8px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin-right: 7px; vertical-align: -1px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr));
  gap: 16px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.sides img, .sides video { display: block; width: 100%; height: auto; border-radius: 6px;
  image-rendering: pixelated; background: #000; }
.sides figcaption { display: flex; justify-content: space-between; gap: 8px; margin-top: 8px;
  font-size: 0.88rem; }
.sides ul { margin: 6px 0 0; padding: 0; list-style: none; font-size: 0.82rem;
  color: var(--soft); }
.verdict { font-variant-numeric: tabular-nums; } .verdict.clean { color: var(--good); }
.verdict.broken { color: var(--bad); }
.key { display: inline-block; width: 18px; height: 9px; border-radius: 2px; }
.key.again { background: #fab833; } .key.fault { background: #e62938; }
pre { overflow-x: auto; font-size: 0.82rem; background: var(--paper); padding: 16px;
  border: 1px solid var(--rule); border-radius: 12px; }
summary { cursor: pointer; }
@media (max-width: 560px) { .sides { grid-template-columns: 1fr; } main { padding: 24px 16px; } }
"""
