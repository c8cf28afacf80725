"""The page that ``report`` fills in. One file, no script, nothing loaded from elsewhere."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --soft: #444; --line: #ccc;
        --rule: #555; --head: #f3f3f3; --reference: #eef4fb; --good: #00573f; --bad: #8a2c00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #1b1d21; --soft: #b0b3b8; --line: #44474d; --rule: #8a8d93;
          --head: #2a2d33; --reference: #22303f; --good: #7fd6b4; --bad: #f0a27a; }
  a { color: #8ab4f8; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       margin: 1.5rem auto; padding: 0 1.25rem; max-width: 84rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 2px solid var(--ink); }
h2, li { overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 62rem; }
nav a { margin-right: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
         vertical-align: top; }
th { border-bottom: 2px solid var(--rule); background: var(--head); }
td.n, th.n { text-align: right; white-space: pre; }
tr.reference td { background: var(--reference); }
tr.published td { color: var(--soft); font-style: italic; }
.status { white-space: nowrap; font-weight: 600; }
.reached { color: var(--good); }
.other { color: var(--bad); }
.evidence { min-width: 16rem; max-width: 40rem; overflow-wrap: anywhere; }
.warnings li, .notes li { margin: .2rem 0; max-width: 74rem; }
img { max-width: 100%; height: auto; display: block; margin: .5rem 0; background: #fff; }
details { margin: .15rem 0; }
summary { cursor: pointer; }
details table { margin: .3rem 0 .6rem 1.2rem; font-size: .9em; }
.small { font-size: .9em; color: var(--soft); overflow-wrap: anywhere; }
@media print { details > *:not(summary) { display: block; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ run_count }} runs, {{ method_count }} methods
{%- if reference %}; ratios are to <b>{{ reference }}</b>{% else %}; no reference named, so no
ratios{% endif %}. Steps and time to target are those of the first evaluation that meets the
validation target; the true crossing lies between it and the evaluation before.</p>
{% if workloads|length > 1 %}<nav>{% for item in workloads -%}
<a href="#{{ item.anchor }}">{{ item.name }}</a>
{%- endfor %}</nav>{% endif %}
{% if warnings %}
<h2>Warnings</h2>
<ul class="warnings">{% for text in warnings %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
{% if notes %}
<h2>Against the paper</h2>
<ul class="notes">{% for text in notes %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
{% for item in workloads %}
<h2 id="{{ item.anchor }}">{{ item.title }}</h2>
<p class="small">Mean and standard error over repetitions that reached the target; ratio of means
with 95&nbsp;% bootstrap interval; AlgoPerf time: fastest trial of each study, median over
studies.</p>
<div class="scroll"><table>
<thead><tr>{% for name in method_columns %}
<th{% if loop.index0 in method_numbers %} class="n"{% endif %}>{{ name }}</th>{% endfor %}
</tr></thead>
<tbody>{% for row in item.methods %}
<tr class="{{ row.kind }}">{% for cell in row.cells %}
<td{% if loop.index0 in method_numbers %} class="n"{% endif %}>{{ cell }}</td>{% endfor %}
</tr>{% endfor %}</tbody>
</table></div>
<img src="data:image/png;base64,{{ item.picture }}" alt="{{ item.name }}: validation metric against
steps and against submission time for each method, with the target and the crossings">
<h3>Runs</h3>
<div class="scroll"><table>
<thead><tr><th>method</th><th>study</th><th>trial</th><th>status</th><th class="n">step</th>
<th class="n">time</th><th class="n">test: step</th><th class="n">resumes</th>
<th>evidence</th></tr></thead>
<tbody>{% for run in item.runs %}
<tr><td>{{ run.method }}</td><td>{{ run.study }}</td><td>{{ run.trial }}</td>
<td class="status {{ 'reached' if run.reached else 'other' }}">{{ run.status }}</td>
<td class="n">{{ run.step }}</td><td class="n">{{ run.time }}</td>
<td class="n">{{ run.test_step }}</td><td class="n">{{ run.resumes }}</td>
<td class="evidence">{{ run.evidence }}</td></tr>{% endfor %}</tbody>
</table></div>
<h3>Hyperparameters</h3>
{% for run in item.runs %}
<details><summary>{{ run.method }}, study {{ run.study }}, trial {{ run.trial }}
<span class="small">{{ run.hardware }}</span></summary>
{% if run.hparams %}<div class="scroll"><table><tbody>{% for name, value in run.hparams %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</tbody></table></div>{% else %}<p class="small">none logged</p>{% endif %}
<p class="small">{{ run.path }}</p>
</details>{% endfor %}
{% endfor %}
{% if profile %}
<h2>AlgoPerf benchmark score</h2>
<p>Over {{ profile.workloads|length }} workload(s): <b>{{ profile.workloads|join(', ') }}</b>, by
time to target. The score is the mean, over factors from 1 to 4 of the best method's time, of the
fraction of workloads that a method finishes within that factor. It depends on which methods and
workloads are compared.{% if profile.absent %} Counted as not reached, because there are no runs:
{{ profile.absent|join('; ') }}.{% endif %}</p>
<div class="scroll"><table><thead><tr><th>method</th><th class="n">score</th>
{% for name in profile.workloads %}<th class="n">{{ name }}: ratio to best</th>{% endfor %}
</tr></thead><tbody>{% for row in profile.rows %}
<tr>{% for cell in row %}<td{% if loop.index0 %} class="n"{% endif %}>{{ cell }}</td>{% endfor %}
</tr>{% endfor %}</tbody></table></div>
<img style="max-width: min(44rem, 100%)" src="data:image/png;base64,{{ profile.picture }}"
alt="Performance profile: fraction of workloads within a factor of the best method's time">
{% endif %}
</body>
</html>
"""
