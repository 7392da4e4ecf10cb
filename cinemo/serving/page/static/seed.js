// A seed that is easy to read out and type again.

export const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
