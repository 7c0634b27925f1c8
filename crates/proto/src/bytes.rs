//! Long runs of bytes, as one run: serde's own way writes and reads a `Vec<u8>` byte by byte.
//!
//! Owns `#[serde(with = "crate::bytes")]`. In postcard both ways are the same bytes.

use serde::{Deserializer, Serializer, de::Error, de::Visitor};
use std::fmt;

/// Writes them.
pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

/// Reads them.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    struct Bytes;
    impl Visitor<'_> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
            to.write_str("bytes")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }

        fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(bytes)
        }
    }
    deserializer.deserialize_byte_buf(Bytes)
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Run(#[serde(with = "super")] Vec<u8>);

    #[test]
    fn the_form_is_that_of_a_list() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let run = postcard::to_stdvec(&Run(bytes.clone())).unwrap();
        assert_eq!(run, postcard::to_stdvec(&bytes).unwrap());
        assert_eq!(postcard::from_bytes::<Run>(&run).unwrap(), Run(bytes));
        assert!(postcard::from_bytes::<Run>(&run[..500]).is_err());
    }
}
