// Keyboard shortcuts of the buttons, and the playing state: from a click on Play until another click or the end of the run.
const plays = () => document.body.dataset.plays && !document.querySelector("[data-ended]");
document.addEventListener("keydown", (event) => {
  const target = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || target.matches("input:not([type=radio]), textarea")) return;
  const buttons = { l: "line", m: "micro-batch", w: "window", r: "restart" };
  let name = buttons[event.key];
  if (event.key === "p") {
    name = plays() ? "pause" : "play";
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
