//! Sets of page numbers, one bit each, that know how many they hold.
//!
//! Kept in chunks of 16 MiB of pages, of which the empty and the full ones take no room: programs reserve terabytes.

const WORDS: usize = 64;
const CHUNK: u64 = WORDS as u64 * 64;

/// A set of numbers below its length.
#[derive(Debug, Clone)]
pub(super) struct Bits {
    chunks: Vec<Chunk>,
    len: u64,
    ones: u64,
}

#[derive(Debug, Clone)]
enum Chunk {
    Empty,
    /// All numbers below the set's length.
    Full,
    Mixed {
        words: Box<[u64; WORDS]>,
        ones: u64,
    },
}

impl Bits {
    pub(super) fn empty(len: u64) -> Bits {
        let chunks = vec![Chunk::Empty; len.div_ceil(CHUNK) as usize];
        Bits { chunks, len, ones: 0 }
    }

    pub(super) fn full(len: u64) -> Bits {
        let chunks = vec![Chunk::Full; len.div_ceil(CHUNK) as usize];
        Bits { chunks, len, ones: len }
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn count(&self) -> u64 {
        self.ones
    }

    pub(super) fn get(&self, at: u64) -> bool {
        at < self.len && self.word(at / 64) >> (at % 64) & 1 == 1
    }

    /// The 64 bits from `at` on; what is beyond the end is clear.
    pub(super) fn window(&self, at: u64) -> u64 {
        let (word, shift) = (at / 64, at % 64);
        let low = self.word(word) >> shift;
        if shift == 0 {
            low
        } else {
            low | self.word(word + 1) << (64 - shift)
        }
    }

    /// Sets those of `mask`, bit i being `at + i`; what is beyond the end is ignored. Returns how many are new.
    pub(super) fn set_window(&mut self, at: u64, mask: u64) -> u64 {
        self.change_window(at, mask, true)
    }

    /// Clears those of `mask`, bit i being `at + i`. Returns how many were set.
    pub(super) fn clear_window(&mut self, at: u64, mask: u64) -> u64 {
        self.change_window(at, mask, false)
    }

    /// Sets `from..to`. Returns how many are new.
    pub(super) fn set_range(&mut self, from: u64, to: u64) -> u64 {
        self.change_range(from, to, true)
    }

    /// Clears `from..to`. Returns how many were set.
    pub(super) fn clear_range(&mut self, from: u64, to: u64) -> u64 {
        self.change_range(from, to, false)
    }

    /// The first at or after `from` that is set here and not in `except` (of the same length).
    pub(super) fn first_without(&self, except: &Bits, from: u64) -> Option<u64> {
        let mut at = from;
        while at < self.len {
            let chunk = (at / CHUNK) as usize;
            if matches!(
                (&self.chunks[chunk], &except.chunks[chunk]),
                (Chunk::Empty, _) | (_, Chunk::Full)
            ) {
                at = (chunk as u64 + 1) * CHUNK;
                continue;
            }
            let found = self.word(at / 64) & !except.word(at / 64) & (u64::MAX << (at % 64));
            if found != 0 {
                return Some(at / 64 * 64 + u64::from(found.trailing_zeros()));
            }
            at = at / 64 * 64 + 64;
        }
        None
    }

    /// Cuts at `at` and returns what was from there on.
    pub(super) fn split_off(&mut self, at: u64) -> Bits {
        let mut rest = Bits::empty(self.len - at);
        if at.is_multiple_of(CHUNK) {
            rest.chunks = self.chunks.split_off((at / CHUNK) as usize);
        } else {
            for (first, many) in self.runs_from(at).collect::<Vec<_>>() {
                rest.set_range(first - at, first - at + many);
            }
            self.clear_range(at, self.len);
            self.chunks.truncate(at.div_ceil(CHUNK) as usize);
        }
        self.len = at;
        self.ones = self.recount();
        rest.ones = rest.recount();
        rest
    }

    /// The runs of set bits: first, and how many.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs_from(0)
    }

    fn runs_from(&self, from: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut at = from;
        std::iter::from_fn(move || {
            let first = self.next(at, true)?;
            at = self.next(first, false).unwrap_or(self.len);
            Some((first, at - first))
        })
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let words = self.len.div_ceil(64);
        let mut bytes: Vec<u8> = (0..words).flat_map(|i| self.word(i).to_le_bytes()).collect();
        bytes.truncate(self.len.div_ceil(8) as usize);
        bytes
    }

    /// `None` unless the bytes are as many as the length wants and nothing beyond it is set.
    pub(super) fn from_bytes(len: u64, bytes: &[u8]) -> Option<Bits> {
        if bytes.len() as u64 != len.div_ceil(8) {
            return None;
        }
        let mut bits = Bits::empty(len);
        for (i, chunk) in bytes.chunks(8).enumerate() {
            let mut eight = [0; 8];
            eight[..chunk.len()].copy_from_slice(chunk);
            let word = u64::from_le_bytes(eight);
            let at = 64 * i as u64;
            if word & !low_mask(len - at) != 0 {
                return None;
            }
            bits.set_window(at, word);
        }
        Some(bits)
    }

    fn next(&self, from: u64, set: bool) -> Option<u64> {
        let mut at = from;
        while at < self.len {
            let skip = match self.chunks[(at / CHUNK) as usize] {
                Chunk::Empty => set,
                Chunk::Full => !set,
                Chunk::Mixed { .. } => false,
            };
            if skip {
                at = (at / CHUNK + 1) * CHUNK;
                continue;
            }
            let word = self.word(at / 64);
            let found = (if set { word } else { !word }) & (u64::MAX << (at % 64));
            if found != 0 {
                let hit = at / 64 * 64 + u64::from(found.trailing_zeros());
                return (hit < self.len).then_some(hit);
            }
            at = at / 64 * 64 + 64;
        }
        None
    }

    fn word(&self, word: u64) -> u64 {
        match self.chunks.get((word / WORDS as u64) as usize) {
            None | Some(Chunk::Empty) => 0,
            Some(Chunk::Full) => low_mask(self.len.saturating_sub(word * 64)),
            Some(Chunk::Mixed { words, .. }) => words[(word % WORDS as u64) as usize],
        }
    }

    fn change_window(&mut self, at: u64, mask: u64, on: bool) -> u64 {
        let mask = mask & low_mask(self.len.saturating_sub(at));
        let (word, shift) = (at / 64, at % 64);
        let mut changed = self.change_word(word, mask << shift, on);
        if shift != 0 {
            changed += self.change_word(word + 1, mask >> (64 - shift), on);
        }
        changed
    }

    fn change_range(&mut self, from: u64, to: u64, on: bool) -> u64 {
        let (mut at, to, mut changed) = (from, to.min(self.len), 0);
        while at < to {
            let end = ((at / CHUNK + 1) * CHUNK).min(self.len);
            if at.is_multiple_of(CHUNK) && to >= end {
                let old = std::mem::replace(
                    &mut self.chunks[(at / CHUNK) as usize],
                    if on { Chunk::Full } else { Chunk::Empty },
                );
                let were = match old {
                    Chunk::Empty => 0,
                    Chunk::Full => end - at,
                    Chunk::Mixed { ones, .. } => ones,
                };
                if on {
                    changed += end - at - were;
                    self.ones += end - at - were;
                } else {
                    changed += were;
                    self.ones -= were;
                }
            } else {
                windows(at, to.min(end), |at, mask| changed += self.change_window(at, mask, on));
            }
            at = end;
        }
        changed
    }

    fn change_word(&mut self, word: u64, mask: u64, on: bool) -> u64 {
        if mask == 0 {
            return 0;
        }
        let index = (word / WORDS as u64) as usize;
        let room = (self.len - index as u64 * CHUNK).min(CHUNK);
        let chunk = &mut self.chunks[index];
        match (&chunk, on) {
            (Chunk::Empty, false) | (Chunk::Full, true) => return 0,
            (Chunk::Empty, true) => {
                *chunk = Chunk::Mixed {
                    words: Box::new([0; WORDS]),
                    ones: 0,
                }
            }
            (Chunk::Full, false) => {
                let words = std::array::from_fn(|i| low_mask(room.saturating_sub(64 * i as u64)));
                *chunk = Chunk::Mixed {
                    words: Box::new(words),
                    ones: room,
                };
            }
            (Chunk::Mixed { .. }, _) => {}
        }
        let Chunk::Mixed { words, ones } = chunk else {
            unreachable!("it has just been made one");
        };
        let slot = &mut words[(word % WORDS as u64) as usize];
        let new = if on { *slot | mask } else { *slot & !mask };
        let changed = u64::from((*slot ^ new).count_ones());
        *slot = new;
        if on {
            *ones += changed;
            self.ones += changed;
        } else {
            *ones -= changed;
            self.ones -= changed;
        }
        if *ones == 0 {
            *chunk = Chunk::Empty;
        } else if *ones == room {
            *chunk = Chunk::Full;
        }
        changed
    }

    fn recount(&self) -> u64 {
        let mut ones = 0;
        for (i, chunk) in self.chunks.iter().enumerate() {
            ones += match chunk {
                Chunk::Empty => 0,
                Chunk::Full => (self.len - i as u64 * CHUNK).min(CHUNK),
                Chunk::Mixed { ones, .. } => *ones,
            };
        }
        ones
    }
}

impl PartialEq for Bits {
    fn eq(&self, other: &Bits) -> bool {
        self.len == other.len && self.ones == other.ones && self.runs().eq(other.runs())
    }
}

/// The lowest `n` bits.
pub(super) fn low_mask(n: u64) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// Calls `f(at, mask)` for windows that cover `from..to` exactly.
fn windows(from: u64, to: u64, mut f: impl FnMut(u64, u64)) {
    let mut at = from;
    while at < to {
        let n = (64 - at % 64).min(to - at);
        f(at, low_mask(n));
        at += n;
    }
}
