//! The page map against a model that keeps one entry a page.

use super::*;
use dunlin_proto::ids::Slot;
use dunlin_proto::pages::AwayImage;

fn image(nonce: u64) -> ImageId {
    ImageId {
        holder: Slot(nonce as u16),
        nonce,
    }
}

/// xorshift64*: one seed reproduces everything.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n
    }
}

#[derive(Clone, Default)]
struct Model {
    /// Registered pages → where they are, if elsewhere: image, address there, asked.
    pages: BTreeMap<u64, Option<(ImageId, u64, bool)>>,
}

impl Model {
    fn away(&self) -> impl Iterator<Item = (u64, ImageId, u64, bool)> + '_ {
        self.pages
            .iter()
            .filter_map(|(a, p)| p.map(|(i, s, asked)| (*a, i, s, asked)))
    }

    fn wanted(&mut self, want: Want, mut f: impl FnMut(u64, u32, &mut bool)) {
        for (address, place) in &mut self.pages {
            if let Some((image, source, asked)) = place {
                let bit = source.wrapping_sub(want.source) / PAGE;
                if *image == want.image && bit < 64 && want.pages >> bit & 1 == 1 {
                    f(*address, bit as u32, asked);
                }
            }
        }
    }
}

fn check(map: &PageMap, model: &mut Model, seed: u64, step: u32) {
    let context = format!("seed {seed} step {step}");
    let registered: Vec<u64> = map
        .regions()
        .flat_map(|(s, n)| (0..n).map(move |i| s + i * PAGE))
        .collect();
    assert!(registered.iter().eq(model.pages.keys()), "{context}: regions");
    for (address, place) in &model.pages {
        let expected = match *place {
            None => Place::NotAway,
            Some((image, source, asked)) => Place::Away { image, source, asked },
        };
        assert_eq!(map.lookup(*address), expected, "{context}: {address:#x}");
    }
    let mut counts = BTreeMap::new();
    for (_, image, ..) in model.away() {
        *counts.entry(image).or_insert(0) += 1;
    }
    assert_eq!(map.per_image(), &counts, "{context}: counts");
    assert_eq!(
        map.asked.values().sum::<u64>(),
        model.away().filter(|p| p.3).count() as u64,
        "{context}: asked"
    );
    assert_eq!(map.is_drained(), counts.is_empty());
}

#[test]
fn it_does_what_a_page_by_page_model_does() {
    for seed in 1..=60 {
        run(seed);
    }
}

fn run(seed: u64) {
    let rng = &mut Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let span = 400;
    let (mut map, mut model) = (PageMap::new(), Model::default());
    let mut at = 0;
    while at < span {
        let pages = (1 + rng.below(90)).min(span - at);
        if rng.below(4) > 0 {
            map.add_region(at * PAGE, pages).unwrap();
            model.pages.extend((at..at + pages).map(|p| (p * PAGE, None)));
            let shift = rng.below(3) * 0x10_0000_0000;
            for nonce in 0..1 + rng.below(2) {
                let first = rng.below(pages);
                let many = 1 + rng.below(pages - first);
                let start = (at + first) * PAGE;
                map.back_with(start, many, image(nonce), start + shift).unwrap();
                for p in 0..many {
                    let place = model.pages.get_mut(&(start + p * PAGE)).unwrap();
                    place.get_or_insert((image(nonce), start + shift + p * PAGE, false));
                }
            }
        }
        at += pages;
    }
    check(&map, &mut model, seed, 0);
    for step in 1..120 {
        let (start, pages) = (rng.below(span) * PAGE, 1 + rng.below(100));
        let end = start + pages * PAGE;
        match rng.below(9) {
            0 => {
                map.settle(start, pages);
                model.pages.range_mut(start..end).for_each(|(_, p)| *p = None);
            }
            1 if rng.below(3) == 0 => {
                map.unmap(start, end);
                model.pages.retain(|a, _| !(start..end).contains(a));
            }
            2 => {
                // To a place of its own, as the kernel does, and half the time the old one stays.
                let to = (1000 + rng.below(300)) * PAGE;
                map.remap(start, to, pages * PAGE);
                let moved: Vec<_> = model.pages.range(start..end).map(|(a, p)| (*a, *p)).collect();
                model.pages.retain(|a, _| !(to..to + pages * PAGE).contains(a));
                for (address, place) in moved {
                    model.pages.insert(address, None);
                    model.pages.insert(to + (address - start), place);
                }
                if rng.below(2) == 0 {
                    map.unmap(start, end);
                    model.pages.retain(|a, _| !(start..end).contains(a));
                }
            }
            3 => {
                map = PageMap::from_image(&map.to_image())
                    .inspect(|_| forget(&mut model))
                    .unwrap()
            }
            4 => {
                let nonce = rng.below(2);
                let source = start + rng.below(3) * 0x10_0000_0000;
                let to = source + pages * PAGE;
                let kept = (source + rng.below(50) * PAGE, source + (50 + rng.below(20)) * PAGE);
                map.keep_only(image(nonce), source, to, &[kept]);
                for place in model.pages.values_mut() {
                    if let Some((i, s, _)) = *place
                        && i == image(nonce)
                        && (source..to).contains(&s)
                        && !(kept.0..kept.1).contains(&s)
                    {
                        *place = None;
                    }
                }
            }
            5 => map.faulted(start),
            6 => {
                map.forget_asked();
                forget(&mut model);
            }
            _ => {
                for _ in 0..rng.below(6) {
                    let only = rng.below(3);
                    let ready = |i: ImageId| only == 2 || i == image(only);
                    let Some(want) = map.next(ready) else {
                        assert!(
                            !model.away().any(|p| ready(p.1) && !p.3),
                            "seed {seed} step {step}: missed one"
                        );
                        break;
                    };
                    assert!(want.pages & 1 == 1);
                    let mut fresh = 0;
                    model.wanted(want, |_, bit, asked| {
                        assert!(!*asked, "seed {seed} step {step}: asked twice");
                        *asked = true;
                        fresh |= 1 << bit;
                    });
                    assert_eq!(fresh, want.pages, "seed {seed} step {step}: wants what is not away");
                    map.set_asked(want, true);
                    if rng.below(3) == 0 {
                        let mut addresses = Vec::new();
                        model.wanted(want, |address, bit, _| addresses.push((address, bit)));
                        let targets = map.targets(want);
                        let mut named: Vec<(u64, u32)> = targets
                            .iter()
                            .flat_map(|t| (0..t.pages).map(|i| (t.address + i * PAGE, t.bit + i as u32)))
                            .collect();
                        named.sort();
                        assert_eq!(named, addresses, "seed {seed} step {step}: targets");
                        for target in targets {
                            map.settle(target.address, target.pages);
                        }
                        model.pages.extend(addresses.iter().map(|(a, _)| (*a, None)));
                    } else if rng.below(3) == 0 {
                        map.set_asked(want, false);
                        model.wanted(want, |_, _, asked| *asked = false);
                    }
                }
            }
        }
        check(&map, &mut model, seed, step);
    }
}

fn forget(model: &mut Model) {
    model.pages.values_mut().flatten().for_each(|p| p.2 = false);
}

#[test]
fn what_is_near_a_fault_comes_first_then_the_small_regions() {
    let mut map = PageMap::new();
    for (start, pages) in [(0x1000_0000, 10_000), (0x7000_0000, 3), (0x8000_0000, 100)] {
        map.add_region(start, pages).unwrap();
        map.back_with(start, pages, image(1), start).unwrap();
    }
    let take = |map: &mut PageMap| {
        let want = map.next(|_| true).unwrap();
        map.set_asked(want, true);
        want
    };
    let small = take(&mut map);
    assert_eq!((small.source, small.pages), (0x7000_0000, 0b111));
    map.faulted(0x1000_0000 + 5000 * PAGE + 77);
    let near = take(&mut map);
    assert_eq!((near.source, near.pages), (0x1000_0000 + 4984 * PAGE, u64::MAX));
    map.faulted(0x1000_0000 + 5048 * PAGE);
    assert_eq!(take(&mut map).source, 0x1000_0000 + 5048 * PAGE);
    let mut sources = Vec::new();
    while let Some(want) = map.next(|_| true) {
        map.set_asked(want, true);
        sources.push(want.source);
    }
    // The focus ends 512 pages after the last fault in it; then the region of 100 pages.
    assert_eq!(sources[6], 0x1000_0000 + (5048 + 64 * 7) * PAGE);
    assert_eq!(sources[7], 0x8000_0000);
    assert_eq!(sources[9], 0x1000_0000);
}

#[test]
fn terabytes_of_nothing_cost_nothing() {
    let mut map = PageMap::new();
    let pages = 1 << 32;
    map.add_region(0, pages).unwrap();
    map.back_with(0, pages, image(1), 0).unwrap();
    map.keep_only(image(1), 0, pages * PAGE, &[(77 * PAGE, 78 * PAGE)]);
    assert_eq!(map.pages_away(), 1);
    assert_eq!(map.to_image().regions[0].layers[0].away, AwayImage::Runs(vec![(77, 1)]));
}

#[test]
fn what_contradicts_itself_is_refused() {
    let mut map = PageMap::new();
    map.add_region(0x10_000, 16).unwrap();
    assert_eq!(map.add_region(0x1f_000, 1), Err(MapError::Overlap(0x1f_000, 1)));
    assert_eq!(map.add_region(0x10_001, 1), Err(MapError::NotPages(0x10_001, 1)));
    assert_eq!(
        map.back_with(0x10_000, 17, image(1), 0),
        Err(MapError::Outside(0x10_000, 17))
    );
    map.back_with(0x10_000, 8, image(1), 0x10_000).unwrap();
    assert_eq!(
        map.back_with(0x18_000, 8, image(1), 0x17_000),
        Err(MapError::Twice(image(1), 0x17_000))
    );
    let mut wire = map.to_image();
    let twice = wire.regions[0].layers[0].clone();
    wire.regions[0].layers.push(twice);
    assert!(PageMap::from_image(&wire).is_err());
    let mut wire = map.to_image();
    wire.regions[0].layers[0].away = AwayImage::Bits(vec![0xff; 3]);
    assert!(PageMap::from_image(&wire).is_err());
    wire.regions[0].layers[0].away = AwayImage::Runs(vec![(7, u64::MAX)]);
    assert!(PageMap::from_image(&wire).is_err());
}

#[test]
fn what_is_recalled_is_elsewhere_again() {
    let (first, second) = (image(1), image(2));
    let mut map = PageMap::new();
    map.add_region(0, 100).unwrap();
    map.add_region(200 * PAGE, 10).unwrap();
    map.back_with(40 * PAGE, 10, second, 1000 * PAGE).unwrap();
    map.settle(0, 100);
    map.back_with(40 * PAGE, 10, second, 1000 * PAGE).unwrap();
    // In no layer now: 0..40, 50..100 and all of the other region. The map is cut at 40 and 50.
    map.recall(30 * PAGE, 175, first);
    assert_eq!(map.per_image(), &BTreeMap::from([(first, 10 + 50 + 5), (second, 10)]));
    let away = |map: &PageMap, page: u64| match map.lookup(page * PAGE) {
        Place::NotAway => None,
        Place::Away { image, source, asked } => Some((image, source / PAGE, asked)),
    };
    assert_eq!(away(&map, 29), None);
    assert_eq!(away(&map, 30), Some((first, 30, false)));
    assert_eq!(
        away(&map, 45),
        Some((second, 1005, false)),
        "another image's page stays with it"
    );
    assert_eq!(away(&map, 99), Some((first, 99, false)));
    assert_eq!(away(&map, 204), Some((first, 204, false)));
    assert_eq!(away(&map, 205), None);
    let want = Want {
        image: first,
        source: 50 * PAGE,
        pages: 0b1111,
    };
    map.set_asked(want, true);
    map.recall(51 * PAGE, 1, first);
    assert_eq!(away(&map, 50), Some((first, 50, true)));
    assert_eq!(away(&map, 51), Some((first, 51, false)), "to be asked for anew");
    map.settle(0, 300);
    assert!(map.is_drained());
    assert!(map.images().eq([first, second]));
    map.recall(52 * PAGE, 2, first);
    map.recall(201 * PAGE, 1, first);
    assert!(map.runs_away().eq([(52 * PAGE, 2), (201 * PAGE, 1)]));
}
