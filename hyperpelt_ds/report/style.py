"""How the page looks: one style sheet for light and dark, narrow and wide, screen and paper.

The colours of runs are told apart by people who see few colours, and each run has a letter besides. Text on every
ground has a contrast of 4.5 or more.
"""

CSS = """
:root { color-scheme: light dark;
  --ground: #fcfcfb; --raised: #ffffff; --ink: #1d2126; --soft: #5b636d; --rule: #e3e5e8; --edge: #c9cdd2;
  --tone0: #0b66b0; --tone1: #b8480a; --tone2: #067a5f; --tone3: #8440a8; --tone4: #8a6500; --tone5: #4c5560;
  --above: 226 132 66; --below: 92 156 212; --good: #067a5f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171b; --raised: #1a1e23; --ink: #e4e7ea; --soft: #9ba4ae; --rule: #2b3037; --edge: #444b54;
  --tone0: #62b2f4; --tone1: #ff9d66; --tone2: #42cfaa; --tone3: #cda0f0; --tone4: #e2bf4e; --tone5: #b5bdc6;
  --above: 160 74 24; --below: 38 98 160; --good: #42cfaa; --bad: #ff8a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 3.5rem; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
header, main, footer { max-width: 1240px; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; font-weight: 650; }
h3 { font-size: .95rem; margin: 1.5rem 0 .5rem; font-weight: 600; }
p { margin: .4rem 0; max-width: 75ch; }
.quiet, footer { color: var(--soft); font-size: .87rem; }
a { color: inherit; text-underline-offset: 2px; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size: .87em; }
code { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--rule); background: var(--raised);
  border-radius: 6px; padding: .6rem .8rem; margin: .5rem 0; max-height: 30rem; overflow: auto; }
nav { position: sticky; top: 0; z-index: 1; background: var(--ground); border-bottom: 1px solid var(--rule); }
nav > div { max-width: 1240px; margin: 0 auto; padding: .5rem 1.25rem; display: flex; flex-wrap: wrap;
  gap: .1rem 1.1rem; font-size: .87rem; align-items: baseline; }
nav a { text-decoration: none; color: var(--soft); }
nav a:hover { color: var(--ink); text-decoration: underline; }
nav .runs { margin-left: auto; display: flex; flex-wrap: wrap; gap: 0 1rem; }
.mark { font-weight: 650; overflow-wrap: anywhere; }
.mark::before { content: ""; display: inline-block; width: .75em; height: .75em; border-radius: 2px;
  margin-right: .4em; background: currentColor; }
.tone0 { color: var(--tone0); } .tone1 { color: var(--tone1); } .tone2 { color: var(--tone2); }
.tone3 { color: var(--tone3); } .tone4 { color: var(--tone4); } .tone5 { color: var(--tone5); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
  margin-top: 1.25rem; align-items: start; }
.card { border: 1px solid var(--rule); background: var(--raised); border-radius: 8px; padding: .8rem 1rem;
  min-width: 0; }
.card h3 { margin: 0 0 .4rem; font-size: 1rem; overflow-wrap: anywhere; }
.card dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .5rem 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.card dd code { display: block; max-height: 6.2em; overflow: auto; }
.scores td:first-child:empty ~ td { padding-top: 0; }
.scores tr:has(+ tr > td:first-child:empty) td { border-bottom: 0; }
.state { font-weight: 650; } .state.good { color: var(--good); } .state.bad { color: var(--bad); }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
td { max-width: 44rem; overflow-wrap: break-word; }
td:first-child, td:first-child code { white-space: nowrap; overflow-wrap: normal; }
td.n, th.n { text-align: right; white-space: nowrap; padding-left: .6rem; }
tr.first td { border-top: 1px solid var(--edge); }
td svg { vertical-align: middle; }
details { margin: .35rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .85rem; width: max-content;
  max-width: 100%; }
summary:hover { color: var(--ink); } details > .scroll { max-height: 22rem; overflow-y: auto; margin-top: .4rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .87rem; font-weight: 600; margin-bottom: .2rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 1.75rem; }
.chart svg { width: 100%; max-width: 520px; height: auto; display: block; }
svg text { font-size: 11.5px; fill: var(--soft); text-anchor: middle; font-variant-numeric: tabular-nums; }
svg text.far { text-anchor: end; } svg text.start { text-anchor: start; }
svg text.end { text-anchor: start; fill: currentColor; font-weight: 600; }
.rule { stroke: var(--rule); } .rail { stroke: var(--edge); }
.curve { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.curve.raw { stroke-width: 1; opacity: .32; } .curve.dashed { stroke-dasharray: 5 4; }
.curve.dot { fill: currentColor; stroke: none; }
.target { fill: currentColor; opacity: 0; } .target:hover { opacity: .45; }
.score circle { fill: currentColor; } .whisker { stroke: currentColor; stroke-width: 2; }
line.prior { stroke: var(--ink); stroke-width: 2; } path.words { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.key svg { vertical-align: -3px; margin-right: .2em; } .key span { margin-right: 1.2em; display: inline-block; }
.maps { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem; }
.matrix { border-collapse: separate; border-spacing: 2px; }
.matrix th { border: 0; padding: .1rem .5rem .1rem 0; font-weight: 500; text-align: right; }
.matrix th[scope=row] { position: sticky; left: 0; background: var(--ground); }
.matrix thead th { padding: 0 0 .3rem; text-align: center; vertical-align: bottom; }
.matrix thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.matrix td { border: 0; border-radius: 3px; padding: .35rem .4rem; min-width: 3.4rem; text-align: center;
  color: var(--ink); }
td.above { background: rgb(var(--above) / var(--share)); } td.below { background: rgb(var(--below) / var(--share)); }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.example { border: 1px solid var(--rule); border-radius: 8px; background: var(--raised); padding: .7rem .9rem;
  font-size: .9rem; overflow-wrap: anywhere; min-width: 0; }
.example img { max-width: 100%; max-height: 11rem; border-radius: 4px; display: block; margin-bottom: .5rem;
  image-rendering: auto; background: #fff; }
.example p { margin: .15rem 0; }
.right::before { content: "✓ "; color: var(--good); font-weight: 700; }
.wrong::before { content: "✗ "; color: var(--bad); font-weight: 700; }
footer { padding-top: 2.5rem; padding-bottom: 2.5rem; }
@media (max-width: 34rem) { body { font-size: 14px; } nav .runs { margin-left: 0; } header, main, footer, nav > div {
  padding-left: .9rem; padding-right: .9rem; } .card dl { gap: .15rem .7rem; }
  .matrix td { min-width: 2.8rem; padding: .3rem .2rem; } }
@media print { nav { position: static; } .card, figure, .example { break-inside: avoid; } }
"""
