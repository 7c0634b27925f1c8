//! A page map as it travels with a process that moves on.

use super::bits::Bits;
use super::{Layer, MapError, PAGE, PageMap, Region, end_of};
use dunlin_proto::pages::{AwayImage, LayerImage, MapImage, RegionImage};

/// Beyond so many runs a bitmap is as short.
const BYTES_PER_RUN: u64 = 6;

impl PageMap {
    /// The portable form. What has been asked for is not in it: whoever reads it has asked for nothing.
    pub fn to_image(&self) -> MapImage {
        let regions = self.regions.iter().map(|(start, region)| RegionImage {
            start: *start,
            pages: region.pages,
            layers: region.layers.iter().map(layer_image).collect(),
        });
        MapImage {
            regions: regions.collect(),
        }
    }

    /// The map that was. The portable form is checked: it may come from a peer.
    pub fn from_image(image: &MapImage) -> Result<PageMap, MapError> {
        let mut map = PageMap::new();
        for region in &image.regions {
            map.add_region(region.start, region.pages)?;
            let mut seen = Bits::empty(region.pages);
            let mut read = Region {
                pages: region.pages,
                layers: Vec::new(),
            };
            for layer in &region.layers {
                end_of(layer.source, region.pages)?;
                let away = read_away(&layer.away, region.pages)?;
                let before = map
                    .by_source
                    .range(..(layer.image, layer.source + region.pages * PAGE))
                    .next_back();
                let overlaps = before.is_some_and(|((image, source), at)| {
                    *image == layer.image && source + map.regions[at].pages * PAGE > layer.source
                });
                if overlaps || read.layers.iter().any(|l| l.image == layer.image) {
                    return Err(MapError::Twice(layer.image, layer.source));
                }
                for (first, many) in away.runs() {
                    if seen.set_range(first, first + many) != many {
                        return Err(MapError::Malformed("a page is at two images"));
                    }
                }
                map.images.insert(layer.image);
                let asked = Bits::empty(region.pages);
                read.layers.push(Layer {
                    image: layer.image,
                    source: layer.source,
                    away,
                    asked,
                });
            }
            map.put_region(region.start, read);
        }
        Ok(map)
    }
}

fn layer_image(layer: &Layer) -> LayerImage {
    let pages = layer.away.len();
    let bitmap_bytes = pages.div_ceil(8);
    let away = if layer.away.count() == pages {
        AwayImage::All
    } else {
        let limit = (bitmap_bytes / BYTES_PER_RUN).max(1) as usize;
        let runs: Vec<(u64, u64)> = layer.away.runs().take(limit + 1).collect();
        if runs.len() <= limit {
            AwayImage::Runs(runs)
        } else {
            AwayImage::Bits(layer.away.to_bytes())
        }
    };
    LayerImage {
        image: layer.image,
        source: layer.source,
        away,
    }
}

fn read_away(away: &AwayImage, pages: u64) -> Result<Bits, MapError> {
    match away {
        AwayImage::All => Ok(Bits::full(pages)),
        AwayImage::Bits(bytes) => {
            Bits::from_bytes(pages, bytes).ok_or(MapError::Malformed("a bitmap does not fit its region"))
        }
        AwayImage::Runs(runs) => {
            let mut bits = Bits::empty(pages);
            for (first, many) in runs {
                let end = first.checked_add(*many).filter(|end| *end <= pages);
                let end = end.ok_or(MapError::Malformed("a run leaves its region"))?;
                if bits.set_range(*first, end) != *many {
                    return Err(MapError::Malformed("runs overlap"));
                }
            }
            Ok(bits)
        }
    }
}
