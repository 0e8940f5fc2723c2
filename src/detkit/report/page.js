"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const at = (id) => document.getElementById(id);
  all(".controls").forEach((one) => (one.hidden = false));

  const curve = at("curve");
  curve.addEventListener("change", () => {
    all(".charts").forEach((one) => (one.hidden = one.dataset.c !== curve.value));
  });

  const score = at("score"), best = at("best"), ofClass = at("class"), size = at("size"), readout = at("readout");
  if (!score) return;
  const addList = (tile) => {
    const list = document.createElement("details");
    list.className = "boxes";
    list.append(document.createElement("summary"), Object.assign(document.createElement("ol"), { tabIndex: 0 }));
    list.addEventListener("toggle", () => show());
    tile.append(list);
    return list;
  };
  const told = (one) => {
    if (one.box) return one.box.textContent;
    const score = Number.isNaN(one.score) || one.kind === "missed" ? "" : ` ${one.score.toFixed(3)}`;
    return `${ofClass.querySelector(`[value="${one.ofClass}"]`).textContent}${score}, ${one.kind}, not drawn`;
  };
  const scenes = all(".scene").map((element) => ({
    element,
    tiles: all(".tile", element).map((tile) => ({
      best: Number(tile.dataset.best || 0),
      found: tile.classList.contains("found"),
      picture: tile.querySelector(".picture"),
      from: tile.querySelector(".from"),
      counts: new Map(["right", "false", "missed"].map((kind) => [kind, tile.querySelector(`.said.${kind} b`)])),
      more: tile.querySelector(".more"),
      list: addList(tile),
      boxes: all(".box", tile).map((box, n) => ({
        box,
        name: tile.querySelector(".names").children[n],
        kind: box.classList[1],
        ofClass: box.dataset.c,
        score: Number(box.dataset.s),
      })).reverse(),
      // What is not drawn is counted all the same.
      rest: (tile.dataset.rest || "").split(";").filter(Boolean).flatMap((group) => {
        const [kind, ofClass, ...scores] = group.split(" ");
        return scores.map((one) => ({ kind, ofClass, score: Number(one) }));
      }),
    })),
  }));

  const show = () => {
    const common = Number(score.value);
    readout.textContent = best.checked ? "own best" : common.toFixed(2);
    for (const scene of scenes) {
      let total = 0;
      for (const tile of scene.tiles) {
        const from = best.checked ? tile.best : common;
        const counts = { right: 0, false: 0, missed: 0, truth: 0, ignored: 0 };
        const shown = [];
        let drawn = 0;
        for (const one of [...tile.boxes, ...tile.rest]) {
          const present = Number.isNaN(one.score) || (one.kind === "missed" ? one.score < from : one.score >= from);
          const visible = present && (ofClass.value === "" || one.ofClass === ofClass.value);
          if (one.box) {
            one.box.toggleAttribute("hidden", !visible);
            one.name.toggleAttribute("hidden", !visible);
          }
          if (visible) { shown.push(one); counts[one.kind] += 1; drawn += one.box ? 1 : 0; }
        }
        total += shown.length;
        tile.picture.classList.toggle("crowded", drawn > 12);
        tile.list.hidden = shown.length <= 12;
        tile.list.firstChild.textContent = `list of ${shown.length} boxes`;
        if (tile.list.open) tile.list.lastChild.replaceChildren(...shown.map((one) => (
          Object.assign(document.createElement("li"), { textContent: told(one) })
        )));
        if (tile.more) tile.more.textContent = shown.length > drawn ? `${shown.length - drawn} more not drawn` : "";
        if (tile.found) {
          tile.from.textContent = `from ${from.toFixed(2)}`;
          for (const [kind, element] of tile.counts) element.textContent = counts[kind];
        }
      }
      scene.element.hidden = ofClass.value !== "" && total === 0;
    }
  };

  // The view is part of the address, so that it can be passed on: #score=0.7&class=bolt
  const read = () => {
    const view = new URLSearchParams(location.hash.slice(1));
    const wanted = Number(view.get("score"));
    if (view.get("score") && wanted >= 0 && wanted <= 1) { score.value = wanted; best.checked = false; }
    const option = [...ofClass.options].find((one) => one.value !== "" && one.textContent === view.get("class"));
    if (option) ofClass.value = option.value;
    show();
  };
  const write = () => {
    const view = new URLSearchParams();
    if (!best.checked) view.set("score", score.value);
    if (ofClass.value !== "") view.set("class", ofClass.selectedOptions[0].textContent);
    try { history.replaceState(null, "", `#${view}`); } catch { /* some viewers forbid it */ }
  };
  score.addEventListener("input", () => { best.checked = false; show(); });
  best.addEventListener("change", show);
  ofClass.addEventListener("change", show);
  for (const one of [score, best, ofClass]) one.addEventListener("change", write);
  size.addEventListener("input", () => {
    document.documentElement.style.setProperty("--tile", `${size.value}px`);
  });
  addEventListener("hashchange", read);
  read();
})();
