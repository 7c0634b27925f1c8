//! Where the pages of one address space are.
//!
//! Owns, for every page of the registered regions, whether it is *elsewhere* (at which image, at which address there,
//! and whether it has been asked for) or not; how munmap, mremap, madvise and fork change that; and what to fetch next.
//! Refuses to know descriptors, connections and time. "Not elsewhere" is one state: whether such a page is here or was
//! never anywhere (and reads as zeros) is the kernel's knowledge, which `UFFDIO_ZEROPAGE` asks and answers at once.
//!
//! Invariants: a page is elsewhere at no more than one image; a page of an image belongs to no more than one address
//! of a space; every count equals what counting would give; addresses are whole pages. A page keeps its address *in the
//! image* for ever, while mremap changes its address *here*: so each region holds layers, and each layer knows where in
//! its image the region begins.

mod bits;
mod changes;
mod order;
mod wire;

#[cfg(test)]
mod tests;

use bits::{Bits, low_mask};
use dunlin_proto::ids::ImageId;
use dunlin_proto::pages::PAGE_BYTES;
use order::Order;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes in a page.
pub const PAGE: u64 = PAGE_BYTES as u64;

/// Why a page map would not take something. The map is as it was, except that regions may have been cut in two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Not whole pages, or beyond the end of the address space.
    #[error("page map: {0:#x} + {1} pages is no range of pages")]
    NotPages(u64, u64),
    /// There is a region already.
    #[error("page map: {0:#x} + {1} pages overlaps a region")]
    Overlap(u64, u64),
    /// There is no region.
    #[error("page map: {0:#x} + {1} pages is not inside the regions")]
    Outside(u64, u64),
    /// A page of an image would be wanted at two places.
    #[error("page map: {1:#x} of {0:?} is wanted at two addresses")]
    Twice(ImageId, u64),
    /// The portable form contradicts itself.
    #[error("page map: its portable form is malformed: {0}")]
    Malformed(&'static str),
}

/// Where one page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Here, or nowhere (zeros): the kernel knows.
    NotAway,
    /// Elsewhere.
    Away {
        /// At this image.
        image: ImageId,
        /// At this address in it.
        source: u64,
        /// It has been asked for.
        asked: bool,
    },
}

/// Pages to ask an image for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// The image.
    pub image: ImageId,
    /// The first page's address in it.
    pub source: u64,
    /// Bit i: the page i pages on. Bit 0 is set.
    pub pages: u64,
}

/// Where pages of an image belong: a run of pages that are adjacent both here and there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The first page's address here.
    pub address: u64,
    /// Its bit in what was asked about.
    pub bit: u32,
    /// How many.
    pub pages: u64,
}

/// The page map of one address space.
///
/// A clone of it is the map of a forked child: pages in flight stay marked as asked for, because the one pager that
/// serves both installs what arrives in every space that lacks it. A space that goes to another pager
/// [forgets](PageMap::forget_asked) what it has asked for.
#[derive(Debug, Clone, Default)]
pub struct PageMap {
    regions: BTreeMap<u64, Region>,
    /// First address in the image of each layer → its region.
    by_source: BTreeMap<(ImageId, u64), u64>,
    away: BTreeMap<ImageId, u64>,
    asked: BTreeMap<ImageId, u64>,
    order: Order,
    /// Every image that has ever stood behind a page.
    images: BTreeSet<ImageId>,
}

/// Registered memory. It stays when all its pages are here: it has to be unregistered at the end.
#[derive(Debug, Clone, PartialEq)]
struct Region {
    pages: u64,
    layers: Vec<Layer>,
}

/// What of a region one image holds.
#[derive(Debug, Clone, PartialEq)]
struct Layer {
    image: ImageId,
    /// Where the region's first page is in the image.
    source: u64,
    away: Bits,
    /// A subset of `away`.
    asked: Bits,
}

impl PageMap {
    /// A map without regions.
    pub fn new() -> PageMap {
        PageMap::default()
    }

    /// Adds a registered region, all of it not elsewhere.
    pub fn add_region(&mut self, start: u64, pages: u64) -> Result<(), MapError> {
        let end = end_of(start, pages)?;
        let before = self.regions.range(..end).next_back();
        if before.is_some_and(|(s, r)| s + r.pages * PAGE > start) {
            return Err(MapError::Overlap(start, pages));
        }
        self.regions.insert(
            start,
            Region {
                pages,
                layers: Vec::new(),
            },
        );
        self.order.regions_changed();
        Ok(())
    }

    /// Makes regions of whatever part of `start..end` is in none yet.
    pub fn cover(&mut self, start: u64, end: u64) -> Result<(), MapError> {
        let mut from = start;
        let inside: Vec<(u64, u64)> = self
            .regions()
            .filter(|(s, pages)| *s < end && s + pages * PAGE > start)
            .collect();
        for (region, pages) in inside {
            if region > from {
                self.add_region(from, (region - from) / PAGE)?;
            }
            from = from.max(region + pages * PAGE);
        }
        if end > from {
            self.add_region(from, (end - from) / PAGE)?;
        }
        Ok(())
    }

    /// Every page of a range of a region that is not elsewhere yet is now at `image`, the first of the range at
    /// `source`. Regions are cut at the ends of the range: whoever knows which pages have content names the whole region
    /// and then [keeps only](PageMap::keep_only) those.
    pub fn back_with(&mut self, start: u64, pages: u64, image: ImageId, source: u64) -> Result<(), MapError> {
        let end = end_of(start, pages)?;
        end_of(source, pages)?;
        self.images.insert(image);
        self.cut(start);
        self.cut(end);
        let starts: Vec<u64> = self.regions.range(start..end).map(|(s, _)| *s).collect();
        let covered: u64 = starts.iter().map(|s| self.regions[s].pages).sum();
        if covered != pages {
            return Err(MapError::Outside(start, pages));
        }
        for at in starts {
            self.back_region(at, image, source + (at - start))?;
        }
        Ok(())
    }

    fn back_region(&mut self, at: u64, image: ImageId, source: u64) -> Result<(), MapError> {
        let region = self.regions.get_mut(&at).expect("the caller has seen it");
        let mut away = Bits::full(region.pages);
        for layer in &region.layers {
            for (first, many) in layer.away.runs() {
                away.clear_range(first, first + many);
            }
            if layer.image == image && layer.source != source {
                return Err(MapError::Twice(image, source));
            }
        }
        let new = away.count();
        if new == 0 {
            return Ok(());
        }
        if let Some(layer) = region.layers.iter_mut().find(|l| l.image == image) {
            for (first, many) in away.runs() {
                layer.away.set_range(first, first + many);
            }
        } else {
            let pages = region.pages;
            let end = source + pages * PAGE;
            let before = self.by_source.range((image, 0)..(image, end)).next_back();
            if before.is_some_and(|((_, s), r)| s + self.regions[r].pages * PAGE > source) {
                return Err(MapError::Twice(image, source));
            }
            let asked = Bits::empty(pages);
            let region = self.regions.get_mut(&at).expect("the caller has seen it");
            region.layers.push(Layer {
                image,
                source,
                away,
                asked,
            });
            self.by_source.insert((image, source), at);
        }
        add(&mut self.away, image, new);
        Ok(())
    }

    /// Where is the page at `address`?
    pub fn lookup(&self, address: u64) -> Place {
        let Some((start, region)) = self.region_of(address) else {
            return Place::NotAway;
        };
        let page = (address - start) / PAGE;
        match region.layers.iter().find(|l| l.away.get(page)) {
            None => Place::NotAway,
            Some(layer) => Place::Away {
                image: layer.image,
                source: layer.source + page * PAGE,
                asked: layer.asked.get(page),
            },
        }
    }

    /// Is the page at `address` in a registered region, as far as known? Regions grow (stacks, mremap) unseen.
    pub fn is_registered(&self, address: u64) -> bool {
        self.region_of(address).is_some()
    }

    /// How many pages from `address` on, at most `limit`, are in the same region and not elsewhere.
    pub fn not_away_run(&self, address: u64, limit: u64) -> u64 {
        let Some((start, region)) = self.region_of(address) else {
            return 0;
        };
        let page = (address - start) / PAGE;
        let limit = limit.min(64).min(region.pages - page);
        let away = region.layers.iter().fold(0, |all, l| all | l.away.window(page));
        u64::from(away.trailing_zeros()).min(limit)
    }

    /// Where do these pages of an image belong? Only what is still elsewhere is named.
    pub fn targets(&self, want: Want) -> Vec<Target> {
        let mut targets = Vec::new();
        self.pieces(want, |region, page, bit, mask| {
            let region_at = &self.regions[&region];
            let layer = region_at
                .layers
                .iter()
                .find(|l| l.image == want.image)
                .expect("it is indexed");
            let mut left = layer.away.window(page) & mask;
            while left != 0 {
                let first = left.trailing_zeros();
                let many = (left >> first).trailing_ones();
                let address = region + (page + u64::from(first)) * PAGE;
                targets.push(Target {
                    address,
                    bit: bit + first,
                    pages: u64::from(many),
                });
                left &= !(low_mask(u64::from(many)) << first);
            }
        });
        targets
    }

    /// These pages of an image have been asked for, or (when the connection broke) have not been after all.
    pub fn set_asked(&mut self, want: Want, asked: bool) {
        let mut pieces = Vec::new();
        self.pieces(want, |region, page, _, mask| pieces.push((region, page, mask)));
        for (region, page, mask) in pieces {
            let region = self.regions.get_mut(&region).expect("it is indexed");
            let layer = region
                .layers
                .iter_mut()
                .find(|l| l.image == want.image)
                .expect("it is indexed");
            if asked {
                let mask = mask & layer.away.window(page);
                add(&mut self.asked, want.image, layer.asked.set_window(page, mask));
            } else {
                subtract(&mut self.asked, want.image, layer.asked.clear_window(page, mask));
            }
        }
    }

    /// Nothing has been asked for.
    pub fn forget_asked(&mut self) {
        for layer in self.regions.values_mut().flat_map(|r| &mut r.layers) {
            layer.asked = Bits::empty(layer.away.len());
        }
        self.asked.clear();
        self.order = Order::default();
    }

    /// The program waits for the page at `address`: what is near it comes first.
    pub fn faulted(&mut self, address: u64) {
        self.order.faulted(address);
    }

    /// What to ask for next, from images that `ready` accepts: around the latest faults, then region by region, the
    /// small ones first. Does not mark it as asked for.
    pub fn next(&mut self, ready: impl Fn(ImageId) -> bool) -> Option<Want> {
        let unasked = |(image, away): (&ImageId, &u64)| self.asked.get(image).is_none_or(|asked| asked < away);
        if !self.away.iter().any(|entry| unasked(entry) && ready(*entry.0)) {
            return None;
        }
        let mut order = std::mem::take(&mut self.order);
        let want = order.next(self, &ready);
        self.order = order;
        want
    }

    /// The wanted pages that have not been asked for among the `limit` pages from `address` on, as far as one image
    /// and one region hold them without a change of address.
    pub fn ahead(&self, address: u64, limit: u64) -> Option<Want> {
        let (start, region) = self.region_of(address)?;
        let page = (address - start) / PAGE;
        let limit = limit.min(64);
        let mut best: Option<(u64, Want)> = None;
        for layer in &region.layers {
            let window = layer.away.window(page) & !layer.asked.window(page) & low_mask(limit);
            if window == 0 {
                continue;
            }
            let first = u64::from(window.trailing_zeros());
            if best.is_none_or(|(b, _)| first < b) {
                let source = layer.source + (page + first) * PAGE;
                best = Some((
                    first,
                    Want {
                        image: layer.image,
                        source,
                        pages: window >> first,
                    },
                ));
            }
        }
        best.map(|(_, want)| want)
    }

    /// How many pages are elsewhere.
    pub fn pages_away(&self) -> u64 {
        self.away.values().sum()
    }

    /// Every image that this map was ever told of, whether it still holds any of its pages: each expects to be released.
    pub fn images(&self) -> impl Iterator<Item = ImageId> + '_ {
        self.images.iter().copied()
    }

    /// An image that holds none of its pages (any more) expects to be released.
    pub fn expect(&mut self, image: ImageId) {
        self.images.insert(image);
    }

    /// How many pages are at each image that holds any.
    pub fn per_image(&self) -> &BTreeMap<ImageId, u64> {
        &self.away
    }

    /// Is nothing elsewhere?
    pub fn is_drained(&self) -> bool {
        self.away.is_empty()
    }

    /// What is elsewhere: start and number of pages, in no particular order.
    pub fn runs_away(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.regions.iter().flat_map(|(start, region)| {
            let runs = region.layers.iter().flat_map(|layer| layer.away.runs());
            runs.map(move |(first, pages)| (start + first * PAGE, pages))
        })
    }

    /// The registered regions: start and number of pages, ascending.
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.regions.iter().map(|(start, region)| (*start, region.pages))
    }

    /// Which ranges of an image are still of interest: first address in it and number of pages.
    pub fn sources(&self, image: ImageId) -> impl Iterator<Item = (u64, u64)> + '_ {
        let layers = self.by_source.range((image, 0)..=(image, u64::MAX));
        layers.map(|((_, source), region)| (*source, self.regions[region].pages))
    }

    fn region_of(&self, address: u64) -> Option<(u64, &Region)> {
        let (start, region) = self.regions.range(..=address).next_back()?;
        (address - start < region.pages * PAGE).then_some((*start, region))
    }

    /// Calls `f(region, page in it, bit, mask)` for each part of `want` that one region holds; `mask` begins at `bit`.
    fn pieces(&self, want: Want, mut f: impl FnMut(u64, u64, u32, u64)) {
        let mut bit = 0;
        while bit < 64 && want.pages >> bit != 0 {
            bit += (want.pages >> bit).trailing_zeros();
            let source = want.source + u64::from(bit) * PAGE;
            let before = self.by_source.range((want.image, 0)..=(want.image, source)).next_back();
            let found = before.and_then(|((_, first), region)| {
                let page = (source - first) / PAGE;
                let left = self.regions[region].pages.checked_sub(page).filter(|left| *left > 0)?;
                Some((*region, page, left.min(64) as u32))
            });
            match found {
                None => bit += 1,
                Some((region, page, left)) => {
                    f(region, page, bit, (want.pages >> bit) & low_mask(u64::from(left)));
                    bit += left;
                }
            }
        }
    }
}

fn add(counts: &mut BTreeMap<ImageId, u64>, image: ImageId, more: u64) {
    if more > 0 {
        *counts.entry(image).or_default() += more;
    }
}

fn subtract(counts: &mut BTreeMap<ImageId, u64>, image: ImageId, less: u64) {
    if let Some(count) = counts.get_mut(&image) {
        *count -= less;
        if *count == 0 {
            counts.remove(&image);
        }
    }
}

fn end_of(start: u64, pages: u64) -> Result<u64, MapError> {
    const LIMIT: u64 = 1 << 57;
    let end = pages.checked_mul(PAGE).and_then(|len| len.checked_add(start));
    match end {
        Some(end) if start.is_multiple_of(PAGE) && pages > 0 && end <= LIMIT => Ok(end),
        _ => Err(MapError::NotPages(start, pages)),
    }
}
