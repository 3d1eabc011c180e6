for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg");
  const source = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(svg));
  const offer = (kind, address) => {
    const link = document.createElement("a");
    link.href = address;
    link.download = `${figure.dataset.name}.${kind}`;
    link.textContent = kind.toUpperCase();
    figure.querySelector("figcaption").append(link, " ");
  };
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = 2 * svg.viewBox.baseVal.width;
    canvas.height = 2 * svg.viewBox.baseVal.height;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    offer("svg", source);
    offer("png", canvas.toDataURL("image/png"));
  };
  image.src = source;
}
