// Keys for what the buttons do. `pause` is clicked where it plays: page.py says so by the page's own state.
document.addEventListener("keydown", (event) => {
  const target = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || target.closest("input, textarea, select, [role=listbox]")) return;
  const buttons = { l: "line", m: "micro-batch", w: "window", r: "restart" };
  let name = buttons[event.key];
  if (event.key === "p") {
    name = document.body.dataset.plays ? "pause" : "play";
  }
  if (name) document.getElementById(name)?.click();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.id === "play") document.body.dataset.plays = "yes";
  else if (["pause", "line", "micro-batch", "window", "restart", "tour-next", "tour-back"].includes(button.id))
    delete document.body.dataset.plays;
});
