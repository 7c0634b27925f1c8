//! What to fetch next: around the latest faults, then region by region, the small ones first.

use super::{PAGE, PageMap, Want};
use dunlin_proto::ids::ImageId;

/// So many places of recent faults are remembered.
const MAX_FOCI: usize = 8;
/// So many pages beyond a fault come before everything else.
const FOCUS_PAGES: u64 = 512;
/// So many pages before a fault come with it.
const BEHIND_PAGES: u64 = 16;

/// Where the drain stands. Holds hints only: whatever it says is checked against the map.
#[derive(Debug, Clone, Default)]
pub(super) struct Order {
    /// Where pages were wanted lately, the latest last: next address to look at, and where to stop.
    foci: Vec<(u64, u64)>,
    /// Starts of the regions in the order of the drain; empty when it has to be made anew.
    queue: Vec<u64>,
    /// Which of them, and which page in it.
    at: (usize, u64),
}

impl Order {
    pub(super) fn regions_changed(&mut self) {
        self.queue.clear();
        self.at = (0, 0);
    }

    pub(super) fn faulted(&mut self, address: u64) {
        let address = address & !(PAGE - 1);
        let end = address + FOCUS_PAGES * PAGE;
        let known = self
            .foci
            .iter()
            .position(|(at, end)| (at.saturating_sub(FOCUS_PAGES * PAGE)..*end).contains(&address));
        let focus = match known {
            // The same stream went on: what lies before has been asked for.
            Some(known) => (self.foci.remove(known).0.min(address), end),
            None => (address.saturating_sub(BEHIND_PAGES * PAGE), end),
        };
        if self.foci.len() == MAX_FOCI {
            self.foci.remove(0);
        }
        self.foci.push(focus);
    }

    pub(super) fn next(&mut self, map: &PageMap, ready: &impl Fn(ImageId) -> bool) -> Option<Want> {
        while let Some((at, end)) = self.foci.pop() {
            let found = (map.region_of(at).map(|(start, _)| start))
                .or_else(|| map.regions.range(at..end).next().map(|(start, _)| *start))
                .and_then(|region| search(map, region, at.saturating_sub(region) / PAGE, ready));
            if let Some((address, want)) = found.filter(|(address, _)| *address < end) {
                self.foci.push((address, end));
                return Some(want);
            }
        }
        if self.queue.is_empty() {
            self.queue = map.regions.keys().copied().collect();
            self.queue.sort_by_key(|start| map.regions[start].pages);
            self.at = (0, 0);
        }
        // Twice round at most: what has been given back after the connection broke lies behind.
        for _ in 0..2 * self.queue.len() {
            let (index, page) = self.at;
            if let Some((address, want)) = search(map, self.queue[index], page, ready) {
                self.at.1 = (address - self.queue[index]) / PAGE;
                return Some(want);
            }
            self.at = ((index + 1) % self.queue.len(), 0);
        }
        None
    }
}

/// The first page of a region, at or after `page`, to be asked for, and those that come with it.
fn search(map: &PageMap, region: u64, page: u64, ready: &impl Fn(ImageId) -> bool) -> Option<(u64, Want)> {
    let layers = &map.regions.get(&region)?.layers;
    let (first, layer) = (layers.iter().filter(|l| ready(l.image)))
        .filter_map(|layer| Some((layer.away.first_without(&layer.asked, page)?, layer)))
        .min_by_key(|(first, _)| *first)?;
    let want = Want {
        image: layer.image,
        source: layer.source + first * PAGE,
        pages: layer.away.window(first) & !layer.asked.window(first),
    };
    Some((region + first * PAGE, want))
}
