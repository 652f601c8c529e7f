"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart");
  if (!chart) return; // no run has a curve
  const caption = document.getElementById("caption");
  const { metric, axis, log_x, log_y } = document.getElementById("controls").elements;

  const OPTIONS = { // none of the buttons reaches out to a network
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "autoScale2d"]],
  };

  /** The runs that have the metric, as plotly's traces. */
  function traces() {
    return data.curves[metric.value].flatMap((curve, number) => {
      if (!curve) return [];
      const { name, colour, dash } = data.runs[number];
      return [{
        type: "scatter", mode: curve.lines < 40 ? "lines+markers" : "lines", name,
        x: data.places[curve.places][axis.value], y: curve.values,
        line: { color: colour, dash, width: 1.8 }, marker: { size: 5 },
        hovertemplate: "%{fullData.name}<br>%{x:,} · %{y:.5g}<extra></extra>",
      }];
    });
  }

  function layout() {
    const scale = (logarithmic, title) => ({
      type: logarithmic ? "log" : "linear", title: { text: title }, automargin: true, showline: true,
      zeroline: false, exponentformat: "power",
    });
    return {
      xaxis: scale(log_x.checked, data.axes[axis.value]), yaxis: scale(log_y.checked, metric.value),
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: true,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, margin: { t: 20, r: 20, b: 50, l: 60 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 13 }, hovermode: "closest",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "#8a9096", activecolor: "#0b5fa5" },
      uirevision: [metric.value, axis.value, log_x.checked, log_y.checked].join(),
    };
  }

  /** What was left out of the picture: runs without the metric, and lines that became means. */
  function describe() {
    const curves = data.curves[metric.value];
    const plain = (number) => {
      const text = document.createElement("textarea"); // names are escaped for plotly
      text.innerHTML = data.runs[number].name;
      return text.value;
    };
    const said = curves.flatMap((curve, number) => {
      if (!curve) return [`${plain(number)} has no ${metric.value}.`];
      if (curve.per_point === 1) return [];
      const lines = curve.lines.toLocaleString("en"), most = curve.per_point.toLocaleString("en");
      return [`${plain(number)}: ${lines} logged lines, each point the mean of up to ${most} consecutive ones.`];
    });
    caption.textContent = said.join(" ") || "Every logged line is drawn.";
  }

  function draw() {
    Plotly.react(chart, traces(), layout(), OPTIONS);
    describe();
  }

  for (const name of Object.keys(data.curves)) metric.add(new Option(name));
  for (const [name, title] of Object.entries(data.axes)) axis.add(new Option(title, name));
  axis.value = "flops";
  document.getElementById("controls").addEventListener("change", draw);
  draw();
})();
