//! How a page map changes: pages arrive or turn out to be zeros, mappings go and move.

use super::bits::Bits;
use super::{Layer, PAGE, PageMap, Region, add, subtract};
use dunlin_proto::ids::ImageId;

impl PageMap {
    /// The pages of a range are no longer elsewhere: they have been installed, or dropped by madvise, or are known to
    /// be zeros.
    pub fn settle(&mut self, start: u64, pages: u64) {
        let end = start.saturating_add(pages.saturating_mul(PAGE));
        let mut starts: Vec<u64> = self.regions.range(start..end).map(|(s, _)| *s).collect();
        starts.extend(self.region_of(start).map(|(s, _)| s).filter(|s| *s < start));
        for at in starts {
            let from = start.saturating_sub(at) / PAGE;
            self.clear(at, from, (end - at).div_ceil(PAGE), None);
        }
    }

    /// Of the image's pages in `from..to`, only those in `present` (ascending) have content; the rest is zeros.
    pub fn keep_only(&mut self, image: ImageId, from: u64, to: u64, present: &[(u64, u64)]) {
        let mut at = from;
        for &(start, end) in present {
            self.settle_source(image, at, start.min(to));
            at = at.max(end);
        }
        self.settle_source(image, at, to);
    }

    fn settle_source(&mut self, image: ImageId, from: u64, to: u64) {
        if from >= to {
            return;
        }
        let mut layers: Vec<(u64, u64)> = Vec::new();
        layers.extend(
            self.by_source
                .range((image, from)..(image, to))
                .map(|((_, s), r)| (*s, *r)),
        );
        layers.extend(
            self.by_source
                .range((image, 0)..(image, from))
                .next_back()
                .map(|((_, s), r)| (*s, *r)),
        );
        for (source, region) in layers {
            let first = from.saturating_sub(source) / PAGE;
            self.clear(region, first, (to - source).div_ceil(PAGE), Some(image));
        }
    }

    /// What is here of a range was copied from `image` before it was written there, from the same addresses: it is
    /// elsewhere again, and has not been asked for. Pages that another image holds, or that are in no region, stay as
    /// they are.
    pub fn recall(&mut self, start: u64, pages: u64, image: ImageId) {
        self.images.insert(image);
        let end = start.saturating_add(pages.saturating_mul(PAGE));
        let mut starts: Vec<u64> = self.regions.range(start..end).map(|(s, _)| *s).collect();
        starts.extend(self.region_of(start).map(|(s, _)| s).filter(|s| *s < start));
        for at in starts {
            let region = self.regions.get_mut(&at).expect("it was found");
            let from = start.saturating_sub(at) / PAGE;
            let to = ((end - at) / PAGE).min(region.pages);
            let mut back = Bits::empty(region.pages);
            back.set_range(from, to);
            for layer in region.layers.iter().filter(|l| l.image != image) {
                for (first, many) in layer.away.runs() {
                    back.clear_range(first, first + many);
                }
            }
            if back.count() == 0 {
                continue;
            }
            if !region.layers.iter().any(|l| l.image == image) {
                let pages = region.pages;
                region.layers.push(Layer {
                    image,
                    source: at,
                    away: Bits::empty(pages),
                    asked: Bits::empty(pages),
                });
                self.by_source.insert((image, at), at);
            }
            let layer = region
                .layers
                .iter_mut()
                .find(|l| l.image == image)
                .expect("it is there");
            for (first, many) in back.runs() {
                add(&mut self.away, image, layer.away.set_range(first, first + many));
                subtract(&mut self.asked, image, layer.asked.clear_range(first, first + many));
            }
        }
        self.order.regions_changed();
    }

    /// munmap: the range is no longer ours.
    pub fn unmap(&mut self, start: u64, end: u64) {
        self.cut(start);
        self.cut(end);
        let starts: Vec<u64> = self.regions.range(start..end).map(|(s, _)| *s).collect();
        for at in starts {
            self.take_region(at);
        }
    }

    /// mremap: what was at `from` is at `to`. The old range stays registered and reads as zeros (an unmap follows if
    /// it does not stay).
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        let end = from.saturating_add(len);
        self.cut(from);
        self.cut(end);
        let starts: Vec<u64> = self.regions.range(from..end).map(|(s, _)| *s).collect();
        let taken: Vec<(u64, Region)> = starts.into_iter().map(|at| (at, self.take_region(at))).collect();
        self.unmap(to, to.saturating_add(len));
        for (at, region) in taken {
            let pages = region.pages;
            self.put_region(to + (at - from), region);
            // Where the two overlap (the kernel does not do that), the new place wins.
            let _ = self.add_region(at, pages);
        }
    }

    /// Clears pages `from..to` of one region, of one image or of all, and drops layers that became empty.
    fn clear(&mut self, at: u64, from: u64, to: u64, of: Option<ImageId>) {
        let region = self.regions.get_mut(&at).expect("the caller has seen it");
        let (away, asked, by_source) = (&mut self.away, &mut self.asked, &mut self.by_source);
        region.layers.retain_mut(|layer| {
            if of.is_some_and(|image| image != layer.image) {
                return true;
            }
            subtract(asked, layer.image, layer.asked.clear_range(from, to));
            subtract(away, layer.image, layer.away.clear_range(from, to));
            let keep = layer.away.count() > 0;
            if !keep {
                by_source.remove(&(layer.image, layer.source));
            }
            keep
        });
    }

    /// Makes a region begin at `address`, if one covers it.
    pub(super) fn cut(&mut self, address: u64) {
        let Some((start, _)) = self.region_of(address).filter(|(s, _)| *s < address) else {
            return;
        };
        let mut region = self.take_region(start);
        let at = (address - start) / PAGE;
        let mut rest = Region {
            pages: region.pages - at,
            layers: Vec::new(),
        };
        region.pages = at;
        for layer in &mut region.layers {
            rest.layers.push(Layer {
                image: layer.image,
                source: layer.source + at * PAGE,
                away: layer.away.split_off(at),
                asked: layer.asked.split_off(at),
            });
        }
        self.put_region(start, region);
        self.put_region(address, rest);
    }

    pub(super) fn take_region(&mut self, at: u64) -> Region {
        let region = self.regions.remove(&at).expect("the caller has seen it");
        for layer in &region.layers {
            self.by_source.remove(&(layer.image, layer.source));
            subtract(&mut self.away, layer.image, layer.away.count());
            subtract(&mut self.asked, layer.image, layer.asked.count());
        }
        self.order.regions_changed();
        region
    }

    pub(super) fn put_region(&mut self, at: u64, mut region: Region) {
        region.layers.retain(|l| l.away.count() > 0);
        for layer in &region.layers {
            self.by_source.insert((layer.image, layer.source), at);
            add(&mut self.away, layer.image, layer.away.count());
            add(&mut self.asked, layer.image, layer.asked.count());
        }
        self.regions.insert(at, region);
        self.order.regions_changed();
    }
}
