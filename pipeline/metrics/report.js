// Reads a chart out where the pointer is: the nearest step, and the value of every line there.
const SVG = "http://www.w3.org/2000/svg";
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const pointer = svg.appendChild(document.createElementNS(SVG, "g"));
  pointer.setAttribute("class", "pointer");
  const tip = svg.parentElement.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;

  const element = (name, values, color) => {
    const made = pointer.appendChild(document.createElementNS(SVG, name));
    for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
    if (color) made.setAttribute("class", color);
  };
  const leave = () => { pointer.replaceChildren(); tip.hidden = true; };
  const show = (event) => {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const at = (event.clientX - box.left) / scale;
    let nearest = 0;
    chart.x.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(chart.x[nearest] - at)) nearest = i; });
    leave();
    element("path", { d: `M${chart.x[nearest]} ${chart.top}V${chart.bottom}` });
    tip.replaceChildren();
    tip.appendChild(document.createElement("b")).textContent = chart.at[nearest];
    for (const line of chart.series) {
      if (line.text[nearest] === null) continue;
      if (line.y[nearest] !== null) element("circle", { cx: chart.x[nearest], cy: line.y[nearest], r: 4.5 }, line.color);
      const row = tip.appendChild(document.createElement("div"));
      row.appendChild(document.createElement("i")).className = `swatch ${line.color}`;
      row.append(`${line.name}  ${line.text[nearest]}`);
    }
    tip.hidden = false;
    const x = chart.x[nearest] * scale;
    tip.style.left = `${x + tip.offsetWidth + 24 > box.width ? x - tip.offsetWidth - 12 : x + 12}px`;
    tip.style.top = "8px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", leave);
}
